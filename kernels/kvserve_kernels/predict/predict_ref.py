"""The definition of sparse linear prediction: matching pursuit on integer correlations, step by step."""

import math

import numpy as np
from numpy.typing import NDArray

_FIT_TOKENS = 256
_GAIN = 0.02
_RIDGE = 1e-3
_LARGEST_WEIGHT = 1024.0


def _levels(x: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each channel in 255 levels, and its greatest magnitude; one that is too small or too large as zeros."""
    stride = -(-len(x) // _FIT_TOKENS)
    some = x[::stride]
    peaks = np.abs(some).max(0)
    known = (peaks > np.float32(1e-30)) & (peaks < np.float32(1e30))
    with np.errstate(divide="ignore", over="ignore"):
        factors = np.where(known, np.float32(127) / peaks, np.float32(0))
    return np.rint(some * factors).astype(np.int64), peaks


def _solve(gram: list[list[float]], cross: list[float]) -> list[float]:
    """Solve by Cholesky, a thousandth added to the diagonal."""
    count = len(cross)
    factor = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1):
            total = gram[i][j] + (gram[i][j] * _RIDGE if i == j else 0.0)
            for k in range(j):
                total -= factor[i][k] * factor[j][k]
            factor[i][j] = math.sqrt(total) if i == j else total / factor[j][j]
    weights = [0.0] * count
    for i in range(count):
        total = cross[i]
        for k in range(i):
            total -= factor[i][k] * weights[k]
        weights[i] = total / factor[i][i]
    for i in reversed(range(count)):
        total = weights[i]
        for k in range(i + 1, count):
            total -= factor[k][i] * weights[k]
        weights[i] = total / factor[i][i]
    return weights


def _pursue(
    gram: NDArray[np.int64], cross: NDArray[np.int64], energy: int, most: int
) -> dict[int, float]:
    """Return the sources of one channel in the order they were found, and their weights."""
    found: dict[int, float] = {}
    for _ in range(most):
        best, best_gain = -1, 0.0
        for j in range(len(cross)):
            left = float(cross[j])
            for source, weight in found.items():
                left -= weight * float(gram[source, j])
            if j not in found and gram[j, j] > 0 and left * left / float(gram[j, j]) > best_gain:
                best, best_gain = j, left * left / float(gram[j, j])
        if best < 0 or best_gain < _GAIN * energy:
            break
        order = [*found, best]
        solved = _solve(
            [[float(gram[a, b]) for b in order] for a in order], [float(cross[a]) for a in order]
        )
        found = dict(zip(order, solved, strict=True))
    return found


def fit(
    before: NDArray[np.float32], x: NDArray[np.float32], sources: int
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """Return sources and weights of each channel."""
    (p, p_peaks), (q, q_peaks) = _levels(before), _levels(x)
    gram, cross = p.T @ p, q.T @ p
    chosen = np.zeros((x.shape[1], sources), np.uint16)
    weights = np.zeros((x.shape[1], sources), np.float64)
    for c in range(x.shape[1]):
        found = _pursue(gram, cross[c], int((q[:, c] ** 2).sum()), sources)
        for k, (source, weight) in enumerate(found.items()):
            chosen[c, k] = source
            below = max(float(p_peaks[source]), float(np.float32(1e-30)))
            weights[c, k] = weight * float(q_peaks[c]) / below
    weights[(np.abs(weights) >= _LARGEST_WEIGHT).any(1)] = 0
    halves = weights.astype(np.float16)
    rest = (x - apply(before, chosen, halves)).astype(np.float64)
    plain = np.cumsum(x.astype(np.float64) ** 2, axis=0)[-1]
    worse = ~(np.cumsum(rest**2, axis=0)[-1] < plain)
    chosen[worse] = 0
    halves[worse] = 0
    return chosen, halves


def apply(
    before: NDArray[np.float32], sources: NDArray[np.uint16], weights: NDArray[np.float16]
) -> NDArray[np.float32]:
    """Return the weighted sum of each channel's sources, in their order."""
    out = np.zeros(before.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(sources.shape[1]):
            out += weights[:, k].astype(np.float32) * before[:, sources[:, k]]
    return out
