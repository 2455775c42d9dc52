"""Symmetric quantisation of rows by their greatest magnitude."""

from kvserve_kernels.absmax.absmax_cpu import decode, encode

__all__ = ["decode", "encode"]
