"""Fixed-length codes for the sixteen most frequent bytes, and a list of the others."""

from kvserve_kernels.escape.escape_cpu import CHUNK, CODES, Escaped, decode, encode

__all__ = ["CHUNK", "CODES", "Escaped", "decode", "encode"]
