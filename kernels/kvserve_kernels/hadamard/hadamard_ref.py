"""The definition of the Walsh–Hadamard transform: its sums and differences in one order, each rounded to float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen


def block_size(dim: int) -> int:
    """Return the largest power of two that divides a dimension."""
    return dim & -dim


def hadamard(x: NDArray[Any]) -> NDArray[np.float32] | None:
    """Transform each block of each row of ``[rows, dim]`` in Hadamard order; None if float32 overflows."""
    rows, dim = x.shape
    size = block_size(dim)
    wide = widen(x) * np.float32(size**-0.5)
    half = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while half < size:
            pairs = wide.reshape(rows, -1, 2, half)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            wide = np.stack([a + b, a - b], axis=2)
            half *= 2
    out = wide.reshape(rows, dim)
    return out if np.isfinite(out).all() else None


def restore(x: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Undo `hadamard`, which is its own inverse, to float32 or bfloat16 bits; overflow is held."""
    rows, dim = x.shape
    size = block_size(dim)
    wide = x * np.float32(size**-0.5)
    half = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while half < size:
            pairs = wide.reshape(rows, -1, 2, half)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            wide = np.stack([a + b, a - b], axis=2)
            half *= 2
    return narrow(wide.reshape(rows, dim), dtype)
