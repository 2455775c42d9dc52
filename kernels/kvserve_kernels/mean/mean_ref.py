"""The definition of means over tokens and of values of components.

Products and sums of 16 tokens are float32, one term after the other and none fused; sums of these are float64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import widen
from kvserve_kernels.mean.turning import Turning

NEAR = 16


def token_means(row: NDArray[Any], turning: Turning | None) -> NDArray[np.float32]:
    """Return the mean over tokens of one layer's keys, turned back, or values.

    Args:
        row: ``[tokens, heads, dim]`` float16, float32, or uint16 holding bfloat16 bits.
        turning: How keys turn; None for values and keys that do not.

    Returns:
        ``[heads, dim]`` float32.
    """
    x = row.astype(np.float32) if row.dtype == np.float16 else widen(row)
    flat = x.reshape(len(x), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        if turning is None:
            total = _sum(flat)
        else:
            own, other = _sum(flat * turning.own), _sum(flat * turning.other)
            total = own + turning.sign * other[turning.partner]
        return (total / len(x)).astype(np.float32).reshape(row.shape[1:])


def combine(levels: NDArray[np.int16], rows: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return ``levels [components] · rows [components, width]``, rows as the bits of bfloat16, in float64."""
    total = np.zeros(rows.shape[1])
    for level, row in zip(levels.tolist(), widen(rows), strict=True):
        total += float(level) * row.astype(np.float64)
    return total


def _sum(terms: NDArray[np.float32]) -> NDArray[np.float64]:
    total = np.zeros(terms.shape[1])
    for start in range(0, len(terms), NEAR):
        near = np.zeros(terms.shape[1], np.float32)
        for term in terms[start : start + NEAR]:
            near += term
        total += near
    return total
