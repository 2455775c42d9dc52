"""Sparse linear prediction on the CPU.

Sources and weights must come out the same on every machine. So correlations are sums of integers, exact in any order,
and what follows is float64 in one order.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit

MAX_SOURCES: Final = 8
_FIT_TOKENS: Final = 256
_TOP: Final = np.float32(127)
_LEAST: Final = np.float32(1e-30)
_MOST: Final = np.float32(1e30)
# a source must explain this share of a channel, or it does not pay for sending which and how much
_GAIN: Final = 0.02
_RIDGE: Final = 1e-3
_LARGEST_WEIGHT: Final = 1024.0
# adding it to a float32 below 2 ** 22 leaves no room for a fraction
_ROUND: Final = np.float32(12_582_912)


@njit
def _levels(x, stride, levels, peaks):  # type: ignore[no-untyped-def]
    channels, count = levels.shape
    for c in range(channels):
        peaks[c] = np.float32(0)
    for i in range(count):
        for c in range(channels):
            v = abs(x[i * stride, c])
            peaks[c] = v if v > peaks[c] else peaks[c]
    for c in range(channels):
        known = peaks[c] > _LEAST and peaks[c] < _MOST
        factor = _TOP / peaks[c] if known else np.float32(0)
        for i in range(count):
            levels[c, i] = np.int16((x[i * stride, c] * factor + _ROUND) - _ROUND)


@njit
def _products(a, b, out):  # type: ignore[no-untyped-def]
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            total = np.int32(0)
            for t in range(a.shape[1]):
                total += np.int32(a[i, t]) * np.int32(b[j, t])
            out[i, j] = total


@njit
def _solve(gram, cross, chosen, count, factor, weights):  # type: ignore[no-untyped-def]
    # Cholesky, with a little added to the diagonal
    for i in range(count):
        for j in range(i + 1):
            total = np.float64(gram[chosen[i], chosen[j]])
            if i == j:
                total += total * _RIDGE
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            factor[i, j] = np.sqrt(total) if i == j else total / factor[j, j]
    for i in range(count):
        total = np.float64(cross[chosen[i]])
        for k in range(i):
            total -= factor[i, k] * weights[k]
        weights[i] = total / factor[i, i]
    for m in range(count):
        i = count - 1 - m
        total = weights[i]
        for k in range(i + 1, count):
            total -= factor[k, i] * weights[k]
        weights[i] = total / factor[i, i]


@njit
def _pursue(gram, cross, energy, sources, weights):  # type: ignore[no-untyped-def]
    channels, most = sources.shape
    factor = np.zeros((most, most))
    chosen = np.zeros(most, np.int64)
    solved = np.zeros(most)
    for c in range(channels):
        count = 0
        for _ in range(most):
            best = -1
            best_gain = 0.0
            for j in range(gram.shape[0]):
                left = np.float64(cross[c, j])
                taken = False
                for k in range(count):
                    left -= solved[k] * gram[chosen[k], j]
                    taken |= chosen[k] == j
                size = np.float64(gram[j, j])
                if taken or size <= 0.0:
                    continue
                gain = left * left / size
                if gain > best_gain:
                    best = j
                    best_gain = gain
            if best < 0 or best_gain < _GAIN * np.float64(energy[c]):
                break
            chosen[count] = best
            count += 1
            _solve(gram, cross[c], chosen, count, factor, solved)
        for k in range(most):
            sources[c, k] = chosen[k] if k < count else 0
            weights[c, k] = solved[k] if k < count else 0.0


@njit
def _apply(before, sources, weights, out):  # type: ignore[no-untyped-def]
    tokens, channels = out.shape
    for t in range(tokens):
        for c in range(channels):
            total = np.float32(0)
            for k in range(sources.shape[1]):
                total += weights[c, k] * before[t, sources[c, k]]
            out[t, c] = total


@njit
def _energies(x, predicted, plain, left):  # type: ignore[no-untyped-def]
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            v = np.float64(x[t, c])
            rest = np.float64(x[t, c] - predicted[t, c])
            plain[c] += v * v
            left[c] += rest * rest


def fit(
    before: NDArray[np.float32], x: NDArray[np.float32], sources: int
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """Find for each channel the channels of the layer before that predict it best, by orthogonal matching pursuit.

    Args:
        before: ``[tokens, channels]``: the layer before, as a decoder has it.
        x: The same shape: the layer to predict.
        sources: Most channels to predict one from, 1 to 8.

    Returns:
        Sources and weights, ``[channels, sources]``; unused ones are 0. They are fitted on at most 256 tokens, evenly
        spread, and kept only for channels whose sum of squares over all tokens they lessen.
    """
    tokens, channels = x.shape
    stride = -(-tokens // _FIT_TOKENS)
    levels = [np.empty((channels, -(-tokens // stride)), np.int16) for _ in range(2)]
    peaks = [np.empty(channels, np.float32) for _ in range(2)]
    for values, of, peak in zip((before, x), levels, peaks, strict=True):
        _levels(values, stride, of, peak)
    gram = np.empty((channels, channels), np.int32)
    cross = np.empty((channels, channels), np.int32)
    _products(levels[0], levels[0], gram)
    _products(levels[1], levels[0], cross)
    energy = (levels[1].astype(np.int64) ** 2).sum(1)
    chosen = np.zeros((channels, sources), np.uint16)
    solved = np.zeros((channels, sources), np.float64)
    _pursue(gram, cross, energy, chosen, solved)
    weights = _in_units(solved, peaks[1], peaks[0], chosen)
    predicted = apply(before, chosen, weights)
    plain, left = np.zeros(channels), np.zeros(channels)
    _energies(x, predicted, plain, left)
    worse = ~(left < plain)
    chosen[worse] = 0
    weights[worse] = 0
    return chosen, weights


def _in_units(
    solved: NDArray[np.float64],
    peaks: NDArray[np.float32],
    source_peaks: NDArray[np.float32],
    chosen: NDArray[np.uint16],
) -> NDArray[np.float16]:
    """Return weights of levels as weights of values."""
    below = np.maximum(source_peaks, _LEAST).astype(np.float64)[chosen]
    scaled = solved * peaks.astype(np.float64)[:, None] / below
    fits = (np.abs(scaled) < _LARGEST_WEIGHT).all(1, keepdims=True)
    return np.where(fits, scaled, 0.0).astype(np.float16)


def apply(
    before: NDArray[np.float32], sources: NDArray[np.uint16], weights: NDArray[np.float16]
) -> NDArray[np.float32]:
    """Return the prediction ``[tokens, channels]``: the weighted sum of each channel's sources, in their order.

    Args:
        before: ``[tokens, channels]``.
        sources: ``[channels, sources]``, each below the number of channels.
        weights: The same shape.
    """
    out = np.empty(before.shape, np.float32)
    wide: Any = weights.astype(np.float32)
    _apply(before, sources, wide, out)
    return out
