"""The 8-bit float format e4m3fn."""

from kvserve_kernels.fp8.fp8_cpu import LARGEST, decode, encode

__all__ = ["LARGEST", "decode", "encode"]
