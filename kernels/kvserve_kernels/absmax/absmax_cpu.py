"""Symmetric quantisation of rows on the CPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import narrow, widen
from kvserve_kernels.jit import njit
from kvserve_kernels.native import Simd, coder, simd

# A peak too small to have a float32 reciprocal is coded as zeros: the error is below it.
_LEAST_PEAK = np.float32(1e-34)
# adding it to a float32 below 2 ** 22 leaves no room for a fraction: halves go to the even integer
_ROUND = np.float32(12_582_912)


@njit
def _encode(x, top, codes, peaks):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    for r in range(rows):
        peak = np.float32(0)
        for j in range(dim):
            v = abs(widen(x[r, j]))
            peak = v if v > peak else peak
        peaks[r] = narrow(peak, peaks[0])
        factor = top / peak if peak > _LEAST_PEAK else np.float32(0)
        for j in range(dim):
            q = widen(x[r, j]) * factor + top
            codes[r, j] = np.uint8(np.int32((q + _ROUND) - _ROUND))


@njit
def _decode(codes, top, peaks, out):  # type: ignore[no-untyped-def]
    rows, dim = codes.shape
    for r in range(rows):
        peak = widen(peaks[r])
        for j in range(dim):
            part = (np.float32(np.int32(codes[r, j])) - top) / top
            out[r, j] = narrow(part * peak, out[0, 0])


def encode(x: NDArray[Any], bins: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Quantise each row to ``2 * (bins // 2) - 1`` codes that are symmetric about zero.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        bins: 4 to 256.

    Returns:
        Codes ``[rows, dim]`` uint8, of which ``bins // 2 - 1`` means 0, and the greatest magnitudes ``[rows]`` in the
        type of ``x``.
    """
    codes = np.empty(x.shape, np.uint8)
    peaks = np.empty(x.shape[0], x.dtype)
    top, level, library = bins // 2 - 1, simd(), coder()
    if library is None or level == Simd.NUMBA:
        _encode(x, np.float32(top), codes, peaks)
    else:
        x = np.ascontiguousarray(x)
        library.kvserve_absmax_encode(
            int(level), x.ctypes.data, *x.shape, top, codes.ctypes.data, peaks.ctypes.data, x.dtype == np.uint16
        )  # fmt: skip
    return codes, peaks


def decode(codes: NDArray[np.uint8], peaks: NDArray[Any], bins: int) -> NDArray[Any]:
    """Undo `encode`; the result has the type of ``peaks`` and is finite for finite peaks."""
    out = np.empty(codes.shape, peaks.dtype)
    _decode(codes, np.float32(bins // 2 - 1), peaks, out)
    return out
