"""Scaling of rows to a mean square near one."""

from kvserve_kernels.scale.scale_cpu import scale, unscale

__all__ = ["scale", "unscale"]
