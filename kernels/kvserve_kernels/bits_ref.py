"""The definition of `kvserve_kernels.bits`: bfloat16 as the uint16 of its bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def widen(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 of float32, or of the bits of bfloat16."""
    if values.dtype == np.float32:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Return float32 or, to nearest even, bfloat16 bits; never past the largest finite number."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if dtype == np.float32:
        over = (bits & 0x7FFFFFFF) >= 0x7F800000
        return np.where(over, (bits & 0x80000000) | 0x7F7FFFFF, bits).view(np.float32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    over = (rounded & 0x7FFF) >= 0x7F80
    return np.where(over, (rounded & 0x8000) | 0x7F7F, rounded).astype(np.uint16)
