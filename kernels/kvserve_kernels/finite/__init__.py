"""Detection of NaN and infinity."""

from kvserve_kernels.finite.finite_cpu import all_finite

__all__ = ["all_finite"]
