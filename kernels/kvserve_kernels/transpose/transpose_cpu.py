"""Transposition of integer matrices in blocks that stay in the first cache."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit
from kvserve_kernels.native import Simd, coder, simd


@njit
def _transpose(x, out):  # type: ignore[no-untyped-def]
    for b in range(x.shape[0]):
        for i0 in range(0, x.shape[1], 32):
            i1 = min(i0 + 32, x.shape[1])
            for j0 in range(0, x.shape[2], 32):
                j1 = min(j0 + 32, x.shape[2])
                for j in range(j0, j1):
                    for i in range(i0, i1):
                        out[b, j, i] = x[b, i, j]


def transpose(x: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Swap the last two dimensions of ``[batch, rows, columns]`` and convert to an integer type."""
    out = np.empty((x.shape[0], x.shape[2], x.shape[1]), dtype)
    library = coder()
    narrow = {np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.uint16)}
    if library is None or simd() == Simd.NUMBA or not {x.dtype, out.dtype} <= narrow:
        _transpose(x, out)
    else:
        x = np.ascontiguousarray(x)
        library.kvserve_transpose(
            x.ctypes.data, *x.shape, x.itemsize, out.ctypes.data, out.itemsize
        )
    return out
