"""The Walsh–Hadamard transform on the CPU: three stages at once inside eight neighbours, then across registers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import narrow, widen
from kvserve_kernels.jit import inline, njit


@inline
def _eights(x):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0] // 8):
        j = 8 * i
        a0, a1, a2, a3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        a4, a5, a6, a7 = x[j + 4], x[j + 5], x[j + 6], x[j + 7]
        b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
        b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
        c0, c1, c2, c3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
        c4, c5, c6, c7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
        x[j], x[j + 1], x[j + 2], x[j + 3] = c0 + c4, c1 + c5, c2 + c6, c3 + c7
        x[j + 4], x[j + 5], x[j + 6], x[j + 7] = c0 - c4, c1 - c5, c2 - c6, c3 - c7


@njit
def _transform(x, size, scale, out):  # type: ignore[no-untyped-def]
    block = np.empty(size, np.float32)
    like = out[0]
    finite = True
    for first in range(0, x.shape[0], size):
        # slices: numba allows negative indices, and the test for them would keep the loops from becoming SIMD
        part, to = x[first : first + size], out[first : first + size]
        for j in range(size):
            block[j] = widen(part[j]) * scale
        half = 1
        if size >= 8:
            _eights(block)
            half = 8
        while half < size:
            for start in range(0, size, 2 * half):
                low, high = block[start : start + half], block[start + half : start + 2 * half]
                for j in range(half):
                    a, b = low[j], high[j]
                    low[j] = a + b
                    high[j] = a - b
            half *= 2
        for j in range(size):
            v = block[j]
            finite &= abs(v) < np.float32(np.inf)
            to[j] = narrow(v, like)
    return finite


def block_size(dim: int) -> int:
    """Return the largest power of two that divides a dimension: the size of the blocks that are transformed."""
    return dim & -dim


def hadamard(x: NDArray[Any]) -> NDArray[np.float32] | None:
    """Transform each block of each row by the orthonormal Walsh–Hadamard matrix in Hadamard order.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.

    Returns:
        The same shape, float32; None if float32 overflows.
    """
    out = np.empty(x.shape, np.float32)
    size = block_size(x.shape[1])
    done = _transform(x.reshape(-1), size, np.float32(size**-0.5), out.reshape(-1))
    return out if done else None


def restore(x: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Undo `hadamard`, to float32 or to bfloat16 bits (uint16), held at the largest finite number."""
    out = np.empty(x.shape, dtype)
    size = block_size(x.shape[1])
    _transform(x.reshape(-1), size, np.float32(size**-0.5), out.reshape(-1))
    return out
