"""The orthonormal Walsh–Hadamard transform of heads."""

from kvserve_kernels.hadamard.hadamard_cpu import block_size, hadamard, restore

__all__ = ["block_size", "hadamard", "restore"]
