"""Centring of channels and quantisation with one constant step, on the CPU.

Sums run over tokens inside and channels outside, in float64 and in one order, so that every machine gets the same bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import float_bits, narrow, widen
from kvserve_kernels.jit import njit

LARGEST_CODE = 32_767
_LEAST_STEP = np.float32(2.0**-120)
# 1.5 * 2**23: adding it to a float32 below 2**22 rounds that to an integer, ties to even
_MAGIC = np.float32(12_582_912.0)


@njit
def _means(x, means):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    total = np.empty(columns, np.float64)
    for layer in range(layers):
        total[:] = 0.0
        for t in range(tokens):
            for j in range(columns):
                total[j] += np.float64(widen(x[layer, t, j]))
        for j in range(columns):
            means[layer, j] = narrow(np.float32(total[j] / tokens), means[0, 0])


@njit
def _subtract(x, means, out):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    finite = True
    for layer in range(layers):
        for t in range(tokens):
            for j in range(columns):
                v = widen(x[layer, t, j]) - widen(means[layer, j])
                finite &= abs(v) < np.float32(np.inf)
                out[layer, t, j] = v
    return finite


@njit
def _add(x, means, out):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    for layer in range(layers):
        for t in range(tokens):
            for j in range(columns):
                out[layer, t, j] = narrow(x[layer, t, j] + widen(means[layer, j]), out[0, 0, 0])


@njit
def _mean_squares(x, out):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    total = np.empty(columns, np.float64)
    for layer in range(layers):
        total[:] = 0.0
        for t in range(tokens):
            for j in range(columns):
                v = np.float64(widen(x[layer, t, j]))
                total[j] += v * v
        whole = 0.0
        for j in range(columns):
            whole += total[j]
        out[layer] = whole / (tokens * columns)


@njit
def _quantise(x, steps, codes):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    magic = float_bits(_MAGIC)
    fits = True
    for layer in range(layers):
        inverse = np.float32(1) / steps[layer] if steps[layer] > 0 else np.float32(0)
        for t in range(tokens):
            for j in range(columns):
                v = widen(x[layer, t, j]) * inverse
                fits &= abs(v) < np.float32(LARGEST_CODE + 0.5)
                codes[layer, t, j] = np.int16(float_bits(v + _MAGIC) - magic)
    return fits


@njit
def _dequantise(codes, steps, out):  # type: ignore[no-untyped-def]
    layers, tokens, columns = codes.shape
    for layer in range(layers):
        step = steps[layer]
        for t in range(tokens):
            for j in range(columns):
                value = np.float32(np.int32(codes[layer, t, j])) * step
                out[layer, t, j] = narrow(value, out[0, 0, 0])


def centre(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any]] | None:
    """Subtract from each channel its mean over the tokens.

    Args:
        x: ``[layers, tokens, columns]`` float32, or uint16 holding bfloat16 bits; finite.

    Returns:
        The differences, float32, and the means ``[layers, columns]``, rounded to the type of ``x`` before they are
        subtracted; None if a difference exceeds float32.
    """
    means = np.empty((x.shape[0], x.shape[2]), x.dtype)
    _means(x, means)
    out = np.empty(x.shape, np.float32)
    return (out, means) if _subtract(x, means, out) else None


def uncentre(x: NDArray[np.float32], means: NDArray[Any]) -> NDArray[Any]:
    """Add the means again; the result has their type."""
    out = np.empty(x.shape, means.dtype)
    _add(x, means, out)
    return out


def relative_steps(x: NDArray[Any], relative: float) -> NDArray[np.float32]:
    """Return for each layer ``relative`` times the root mean square of its values, ``[layers]`` float32.

    A step below 2**-120, whose reciprocal float32 could not hold, becomes 0; one beyond float32, infinity.
    """
    squares = np.empty(x.shape[0], np.float64)
    _mean_squares(x, squares)
    with np.errstate(over="ignore"):
        steps = (np.sqrt(squares) * relative).astype(np.float32)
    steps[steps < _LEAST_STEP] = 0
    return steps


def quantise(x: NDArray[Any], steps: NDArray[np.float32]) -> NDArray[np.int16] | None:
    """Round each value to the nearest multiple of its layer's step, ties to even.

    Args:
        x: ``[layers, tokens, columns]`` float32, or uint16 holding bfloat16 bits; finite.
        steps: ``[layers]``; a layer with step 0 becomes zeros.

    Returns:
        The multiples, int16; None if one exceeds ``LARGEST_CODE``.
    """
    codes = np.empty(x.shape, np.int16)
    return codes if _quantise(x, steps, codes) else None


def dequantise(codes: NDArray[np.int16], steps: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Undo `quantise`, to float32 or to bfloat16 bits (uint16)."""
    out = np.empty(codes.shape, dtype)
    _dequantise(codes, steps, out)
    return out
