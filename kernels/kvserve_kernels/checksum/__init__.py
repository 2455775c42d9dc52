"""XXH64, the checksum of a payload."""

from kvserve_kernels.checksum.checksum_cpu import checksum

__all__ = ["checksum"]
