"""The definition of e4m3fn rounding: the nearest of the numbers that exist, the even one of two equally near."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen

_LARGEST = np.float32(448)
_LEAST_PEAK = np.float32(1e-34)


def numbers() -> NDArray[np.float32]:
    """Return the 127 numbers that are not negative, ``[127]``, by code."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    normal = np.ldexp(8.0 + mantissa, exponent - 10)
    return np.where(exponent > 0, normal, np.ldexp(mantissa.astype(float), -9)).astype(np.float32)


def encode(x: NDArray[Any], *, scaled: bool) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Round each value of ``[rows, dim]``, if ``scaled`` so that each row's greatest magnitude becomes 448."""
    wide = widen(x)
    peaks = np.abs(wide).max(axis=1)
    if scaled:
        with np.errstate(divide="ignore", over="ignore"):
            scale = np.where(peaks > _LEAST_PEAK, _LARGEST / peaks, np.float32(0))
        wide = wide * scale[:, None]
    magnitude = np.minimum(np.abs(wide), _LARGEST).astype(np.float64)
    table = numbers().astype(np.float64)
    above = np.clip(np.searchsorted(table, magnitude), 1, 126)
    below = above - 1
    up, down = table[above] - magnitude, magnitude - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    signs = np.where(np.signbit(wide), 0x80, 0)
    codes: NDArray[np.uint8] = (code | signs).astype(np.uint8)
    return codes, narrow(peaks, x.dtype) if scaled else np.empty(0, x.dtype)


def decode(codes: NDArray[np.uint8], peaks: NDArray[Any], *, scaled: bool) -> NDArray[Any]:
    """Undo `encode`, for codes that are numbers."""
    magnitude = numbers()[codes & 0x7F]
    if scaled:
        magnitude = magnitude * (widen(peaks) / _LARGEST)[:, None]
    return narrow(np.where(codes >= 0x80, -magnitude, magnitude).astype(np.float32), peaks.dtype)
