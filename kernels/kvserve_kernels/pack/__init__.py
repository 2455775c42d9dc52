"""Fixed-width packing of codes."""

from kvserve_kernels.pack.pack_cpu import pack, packed_nbytes, unpack

__all__ = ["pack", "packed_nbytes", "unpack"]
