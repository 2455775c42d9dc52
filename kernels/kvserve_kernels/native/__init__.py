"""The C part of the kernels: sources, how they are built, and how they are loaded.

A wheel for Linux carries the library; in a clone ``make setup`` builds it. Where there is none, numba does the same
work with the same bytes, several times slower.
"""

from kvserve_kernels.native.library import Simd, coder, simd

__all__ = ["Simd", "coder", "simd"]
