"""Means over the tokens of a piece, and values of components: sums whose order is fixed, on every processor."""

from kvserve_kernels.mean.mean_cpu import combine, token_means
from kvserve_kernels.mean.turning import Turning

__all__ = ["Turning", "combine", "token_means"]
