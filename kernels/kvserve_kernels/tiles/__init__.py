"""Rows of numbers into tiles with pairs side by side, and back."""

from kvserve_kernels.tiles.tiles_cpu import put, take

__all__ = ["put", "take"]
