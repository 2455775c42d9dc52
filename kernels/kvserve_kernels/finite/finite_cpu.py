"""Whether an array holds no NaN and no infinity, by its exponent bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit
from kvserve_kernels.native import Simd, coder, simd

_EXPONENTS = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}


@njit
def _finite(words, mask):  # type: ignore[no-untyped-def]
    # blocks, so that the inner loop has no exit and becomes SIMD
    for start in range(0, words.shape[0], 4096):
        bad = False
        for i in range(start, min(start + 4096, words.shape[0])):
            bad |= (words[i] & mask) == mask
        if bad:
            return False
    return True


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Tell whether no value is NaN or infinite.

    Args:
        values: Any shape, contiguous; float16, float32, or uint16 holding bfloat16 bits.
        dtype: ``bfloat16``, ``float16`` or ``float32``: what the bits mean.
    """
    library = coder()
    if library is not None and simd() != Simd.NUMBA:
        mantissa = {"bfloat16": 7, "float16": 10, "float32": 23}[dtype]
        return bool(library.kvserve_finite(values.ctypes.data, values.size, mantissa))
    word: Any = np.uint16 if values.dtype.itemsize == 2 else np.uint32
    mask = word(_EXPONENTS[values.dtype.itemsize][dtype])
    return bool(_finite(values.reshape(-1).view(word), mask))
