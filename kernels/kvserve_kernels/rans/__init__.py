"""Entropy coding of integers: tables made from the data, symbols with raw low bits and escapes, interleaved rANS."""

from kvserve_kernels.rans.models import MAX_LOW_BITS, MAX_TABLES, Model, assign, build
from kvserve_kernels.rans.rans_cpu import (
    LANES,
    MAX_SYMBOLS,
    TOTAL,
    decode,
    encode,
    slot_tables,
)
from kvserve_kernels.rans.symbols_cpu import merge, plane_words, split
from kvserve_kernels.rans.values import Coded, Tables, decode_values, encode_values, streams

__all__ = [
    "LANES",
    "MAX_LOW_BITS",
    "MAX_SYMBOLS",
    "MAX_TABLES",
    "TOTAL",
    "Coded",
    "Model",
    "Tables",
    "assign",
    "build",
    "decode",
    "decode_values",
    "encode",
    "encode_values",
    "merge",
    "plane_words",
    "slot_tables",
    "split",
    "streams",
]
