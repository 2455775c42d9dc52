"""Quantisation to centroids on the CPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import narrow, widen
from kvserve_kernels.jit import njit

# A scale too small to have a float32 reciprocal makes all values of its row zeros: the error is below it.
_LEAST_SCALE = np.float32(1e-34)


@njit
def _root_mean_squares(x, out):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    for r in range(rows):
        total = 0.0
        for j in range(dim):
            v = np.float64(widen(x[r, j]))
            total += v * v
        root = np.float32(np.sqrt(total / dim))
        if not root < np.float32(np.inf):
            return False
        out[r] = narrow(root, out[0])
    return True


@njit
def _encode(x, scales, thresholds, codes):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    scaled = np.empty(dim, np.float32)
    for r in range(rows):
        scale = widen(scales[r])
        inverse = np.float32(1) / scale if scale > _LEAST_SCALE else np.float32(0)
        for j in range(dim):
            scaled[j] = widen(x[r, j]) * inverse
            codes[r, j] = np.uint8(0)
        # thresholds outside, so that the inner loop runs over neighbours in wide registers
        for k in range(thresholds.shape[0]):
            for j in range(dim):
                codes[r, j] += np.uint8(scaled[j] > thresholds[k])


@njit
def _decode(codes, scales, centroids, out):  # type: ignore[no-untyped-def]
    rows, dim = codes.shape
    last = centroids.shape[0] - 1
    for r in range(rows):
        scale = widen(scales[r])
        for j in range(dim):
            out[r, j] = narrow(centroids[min(codes[r, j], last)] * scale, out[0, 0])


def root_mean_squares(x: NDArray[Any], dtype: Any) -> NDArray[Any] | None:
    """Return the root mean square of each row.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        dtype: Of the result: float32, or uint16 for bfloat16 bits.

    Returns:
        ``[rows]``, summed in float64 from left to right; None if one exceeds float32.
    """
    out = np.empty(x.shape[0], dtype)
    return out if _root_mean_squares(x, out) else None


def encode(
    x: NDArray[Any], scales: NDArray[Any], thresholds: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return for each value, divided by its row's scale, how many thresholds lie below it.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        scales: ``[rows]`` float32 or bfloat16 bits, not negative.
        thresholds: Rising, at most 255.
    """
    codes = np.empty(x.shape, np.uint8)
    _encode(x, scales, thresholds, codes)
    return codes


def decode(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    centroids: NDArray[np.float32],
    dtype: Any,
) -> NDArray[Any]:
    """Return each code's centroid times its row's scale, as float32 or as bfloat16 bits (uint16); always finite.

    A code past the last centroid counts as the last.
    """
    out = np.empty(codes.shape, dtype)
    _decode(codes, scales, centroids, out)
    return out
