"""Rows of numbers into the blocks of a paged cache, and back."""

from kvserve_kernels.blocks.blocks_cpu import put, take

__all__ = ["put", "take"]
