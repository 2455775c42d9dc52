"""The definition of symmetric quantisation: codes ``round(x * c / peak) + c`` with c = bins // 2 - 1.

Every operation is one rounding in float32, and halves go to the even code: so does PyTorch, and so do peers built on
it, whose values must come out the same.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen

_LEAST_PEAK = np.float32(1e-34)


def encode(x: NDArray[Any], bins: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return codes ``[rows, dim]`` and the rows' greatest magnitudes ``[rows]``."""
    top = np.float32(bins // 2 - 1)
    wide = widen(x)
    peaks = np.abs(wide).max(1)
    with np.errstate(divide="ignore", over="ignore"):
        factors = np.where(peaks > _LEAST_PEAK, top / peaks, np.float32(0))
    codes = np.rint(wide * factors[:, None] + top).astype(np.uint8)
    return codes, narrow(peaks, x.dtype)


def decode(codes: NDArray[np.uint8], peaks: NDArray[Any], bins: int) -> NDArray[Any]:
    """Undo `encode`."""
    top = np.float32(bins // 2 - 1)
    parts = (codes.astype(np.float32) - top) / top
    with np.errstate(over="ignore"):
        return narrow(parts * widen(peaks)[:, None], peaks.dtype)
