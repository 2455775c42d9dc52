"""Floats as exponent and rest."""

from kvserve_kernels.floats.floats_cpu import MANTISSA_BITS, join, split

__all__ = ["MANTISSA_BITS", "join", "split"]
