"""Rotary position embedding (Su et al., 2021): applied, and undone."""

from kvserve_kernels.rotate.rotate_cpu import rotate, unrotate
from kvserve_kernels.rotate.tables import tables

__all__ = ["rotate", "tables", "unrotate"]
