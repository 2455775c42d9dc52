"""The linear transform and the ladder's coder in one: values to sections of levels and back, by native code only."""

from kvserve_kernels.fused.fused_native import available, decode, decode_runs, encode, encode_runs

__all__ = ["available", "decode", "decode_runs", "encode", "encode_runs"]
