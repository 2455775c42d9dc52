"""Transposition between token-major and channel-major order."""

from kvserve_kernels.transpose.transpose_cpu import transpose

__all__ = ["transpose"]
