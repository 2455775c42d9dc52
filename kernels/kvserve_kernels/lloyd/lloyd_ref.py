"""The definition of quantisation to centroids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen

_LEAST_SCALE = np.float32(1e-34)


def root_mean_squares(x: NDArray[Any], dtype: Any) -> NDArray[Any] | None:
    """Return the root mean square of each row, as float32 or bfloat16 bits; None if one exceeds float32."""
    sums = np.cumsum(widen(x).astype(np.float64) ** 2, axis=1)[:, -1]
    with np.errstate(over="ignore"):
        roots: NDArray[np.float32] = np.sqrt(sums / x.shape[1]).astype(np.float32)
    return narrow(roots, dtype) if np.isfinite(roots).all() else None


def encode(
    x: NDArray[Any], scales: NDArray[Any], thresholds: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return for each value over its row's scale how many thresholds lie below it."""
    wide = widen(scales)
    with np.errstate(divide="ignore", over="ignore"):
        inverses = np.where(wide > _LEAST_SCALE, np.float32(1) / wide, np.float32(0))
    scaled = widen(x) * inverses[:, None]
    codes: NDArray[np.uint8] = (scaled[:, :, None] > thresholds).sum(2).astype(np.uint8)
    return codes


def decode(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    centroids: NDArray[np.float32],
    dtype: Any,
) -> NDArray[Any]:
    """Undo `encode`."""
    with np.errstate(over="ignore"):
        wide = centroids[np.minimum(codes, len(centroids) - 1)] * widen(scales)[:, None]
    return narrow(wide, dtype)
