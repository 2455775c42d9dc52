"""Min-max quantisation in groups along a row (a token's head) or along a column (a channel over tokens)."""

from kvserve_kernels.minmax.minmax_cpu import (
    decode_columns,
    decode_rows,
    encode_columns,
    encode_rows,
)

__all__ = ["decode_columns", "decode_rows", "encode_columns", "encode_rows"]
