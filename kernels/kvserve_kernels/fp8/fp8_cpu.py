"""Conversion to and from e4m3fn on the CPU, by integer arithmetic on float32 bits that becomes SIMD."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import bits_float, float_bits, narrow, widen
from kvserve_kernels.jit import njit

LARGEST = 448.0
_LARGEST = np.float32(LARGEST)
_LEAST_PEAK = np.float32(1e-34)
_LEAST_NORMAL = np.float32(2.0**-6)
# adding 2**14 to a float32 below it leaves multiples of 2**-9, the least e4m3 subnormal, in the low bits
_SUBNORMAL = np.float32(2.0**14)
_REBIAS = np.float32(2.0**120)


@njit
def _encode(x, scaled, codes, peaks):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    subnormal = float_bits(_SUBNORMAL)
    for r in range(rows):
        scale = np.float32(1)
        if scaled:
            peak = np.float32(0)
            for j in range(dim):
                v = abs(widen(x[r, j]))
                peak = v if v > peak else peak
            peaks[r] = narrow(peak, peaks[0])
            scale = _LARGEST / peak if peak > _LEAST_PEAK else np.float32(0)
        for j in range(dim):
            v = widen(x[r, j]) * scale
            sign = (float_bits(v) >> np.uint32(24)) & np.uint32(0x80)
            a = min(abs(v), _LARGEST)
            bits = float_bits(a)
            odd = (bits >> np.uint32(20)) & np.uint32(1)
            normal = ((bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32(120 << 3)
            small = float_bits(a + _SUBNORMAL) - subnormal
            codes[r, j] = np.uint8(sign | (normal if a >= _LEAST_NORMAL else small))


@njit
def _decode(codes, scaled, peaks, out):  # type: ignore[no-untyped-def]
    rows, dim = codes.shape
    for r in range(rows):
        scale = widen(peaks[r]) / _LARGEST if scaled else np.float32(1)
        for j in range(dim):
            code = np.uint32(codes[r, j])
            magnitude = bits_float(np.uint32((code & np.uint32(0x7F)) << np.uint32(20))) * _REBIAS
            value = magnitude * scale
            out[r, j] = narrow(-value if code >= np.uint32(0x80) else value, out[0, 0])


def encode(x: NDArray[Any], *, scaled: bool) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Round each value to the nearest e4m3 number, ties to even; beyond the largest, to the largest.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        scaled: Scale each row so that its greatest magnitude becomes 448.

    Returns:
        Codes ``[rows, dim]`` uint8, and the greatest magnitude of each row ``[rows]`` in the type of ``x`` (empty if
        not scaled).
    """
    codes = np.empty(x.shape, np.uint8)
    peaks = np.empty(x.shape[0] if scaled else 0, x.dtype)
    _encode(x, scaled, codes, peaks)
    return codes, peaks


def decode(codes: NDArray[np.uint8], peaks: NDArray[Any], *, scaled: bool) -> NDArray[Any]:
    """Undo `encode`; the result has the type of ``peaks``.

    The two codes for NaN, which `encode` never writes, give a finite number beyond the largest.
    """
    out = np.empty(codes.shape, peaks.dtype)
    _decode(codes, scaled, peaks, out)
    return out
