"""Means over tokens and values of components on the CPU, by numba."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import widen
from kvserve_kernels.jit import njit
from kvserve_kernels.mean.mean_ref import NEAR
from kvserve_kernels.mean.turning import Turning


@njit
def _sum(x, total):  # type: ignore[no-untyped-def]
    tokens, width = x.shape
    near = np.empty(width, np.float32)
    for start in range(0, tokens, NEAR):
        near[:] = 0
        for t in range(start, min(start + NEAR, tokens)):
            part = x[t]
            for j in range(width):
                near[j] += widen(part[j])
        for j in range(width):
            total[j] += np.float64(near[j])


@njit
def _weighted_sums(x, own, other, total, total_other):  # type: ignore[no-untyped-def]
    tokens, width = x.shape
    near = np.empty(width, np.float32)
    near_other = np.empty(width, np.float32)
    for start in range(0, tokens, NEAR):
        near[:] = 0
        near_other[:] = 0
        for t in range(start, min(start + NEAR, tokens)):
            part, weights, others = x[t], own[t], other[t]
            for j in range(width):
                value = widen(part[j])
                near[j] += value * weights[j]
                near_other[j] += value * others[j]
        for j in range(width):
            total[j] += np.float64(near[j])
            total_other[j] += np.float64(near_other[j])


@njit
def _combine(levels, rows, total):  # type: ignore[no-untyped-def]
    components, width = rows.shape
    for c in range(components):
        level = np.float64(levels[c])
        # most are zero, and the sum does not see them
        if level != 0:
            row = rows[c]
            for j in range(width):
                total[j] += level * np.float64(widen(row[j]))


def token_means(row: NDArray[Any], turning: Turning | None) -> NDArray[np.float32]:
    """Return the mean over tokens of one layer's keys, turned back, or values; the same bits on every machine.

    Args:
        row: ``[tokens, heads, dim]`` float16, float32, or uint16 holding bfloat16 bits.
        turning: How keys turn; None for values and keys that do not.

    Returns:
        ``[heads, dim]`` float32; not finite if a value is not.
    """
    x = _plain(row.astype(np.float32) if row.dtype == np.float16 else row)
    flat = x.reshape(len(x), -1)
    total = np.zeros(flat.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        if turning is None:
            _sum(flat, total)
        else:
            across = np.zeros_like(total)
            _weighted_sums(flat, turning.own, turning.other, total, across)
            total += turning.sign * across[turning.partner]
        return (total / len(x)).astype(np.float32).reshape(row.shape[1:])


def combine(levels: NDArray[np.int16], rows: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return ``levels [components] · rows [components, width]`` in float64; the same bits on every machine.

    Args:
        levels: Levels.
        rows: The bits of bfloat16.
    """
    total = np.zeros(rows.shape[1])
    _combine(_plain(levels), _plain(rows), total)
    return total


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array for which numba has compiled already: contiguous, and not read-only."""
    return np.require(array, requirements=["C", "W"])
