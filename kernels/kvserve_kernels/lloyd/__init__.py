"""Quantisation of rows to given centroids, after division by their root mean square."""

from kvserve_kernels.lloyd.lloyd_cpu import decode, encode, root_mean_squares

__all__ = ["decode", "encode", "root_mean_squares"]
