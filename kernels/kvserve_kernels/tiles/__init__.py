"""Rows of numbers into tiles with pairs side by side."""

from kvserve_kernels.tiles.tiles_cpu import put

__all__ = ["put"]
