"""Rotation and its undoing on the CPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import narrow, widen
from kvserve_kernels.jit import njit


@njit
def _unrotate(x, cos, sin, interleaved, out):  # type: ignore[no-untyped-def]
    layers, tokens, heads, dim = x.shape
    pairs = cos.shape[1]
    for layer in range(layers):
        for t in range(tokens):
            for h in range(heads):
                if interleaved:
                    for i in range(pairs):
                        a, b = widen(x[layer, t, h, 2 * i]), widen(x[layer, t, h, 2 * i + 1])
                        out[layer, t, h, 2 * i] = a * cos[t, i] + b * sin[t, i]
                        out[layer, t, h, 2 * i + 1] = b * cos[t, i] - a * sin[t, i]
                else:
                    for i in range(pairs):
                        a, b = widen(x[layer, t, h, i]), widen(x[layer, t, h, i + pairs])
                        out[layer, t, h, i] = a * cos[t, i] + b * sin[t, i]
                        out[layer, t, h, i + pairs] = b * cos[t, i] - a * sin[t, i]
                for j in range(2 * pairs, dim):
                    out[layer, t, h, j] = widen(x[layer, t, h, j])


@njit
def _rotate(x, cos, sin, interleaved, out):  # type: ignore[no-untyped-def]
    layers, tokens, heads, dim = x.shape
    pairs = cos.shape[1]
    like = out[0, 0, 0, 0]
    for layer in range(layers):
        for t in range(tokens):
            for h in range(heads):
                if interleaved:
                    for i in range(pairs):
                        a, b = x[layer, t, h, 2 * i], x[layer, t, h, 2 * i + 1]
                        first = a * cos[t, i] - b * sin[t, i]
                        out[layer, t, h, 2 * i] = narrow(first, like)
                        second = b * cos[t, i] + a * sin[t, i]
                        out[layer, t, h, 2 * i + 1] = narrow(second, like)
                else:
                    for i in range(pairs):
                        a, b = x[layer, t, h, i], x[layer, t, h, i + pairs]
                        first = a * cos[t, i] - b * sin[t, i]
                        out[layer, t, h, i] = narrow(first, like)
                        second = b * cos[t, i] + a * sin[t, i]
                        out[layer, t, h, i + pairs] = narrow(second, like)
                for j in range(2 * pairs, dim):
                    out[layer, t, h, j] = narrow(x[layer, t, h, j], like)


def unrotate(
    x: NDArray[Any], cos: NDArray[np.float32], sin: NDArray[np.float32], interleaved: bool
) -> NDArray[np.float32]:
    """Turn keys back by the angles of their tokens.

    Args:
        x: ``[layers, tokens, heads, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        cos: ``[tokens, pairs]`` of `tables`, with ``2 * pairs <= dim``.
        sin: The same.
        interleaved: Pairs are neighbours; else the members of a pair are ``pairs`` apart.

    Returns:
        The same shape, float32; values beyond the pairs are as they were. Near the end of float32's range infinite.
    """
    out = np.empty(x.shape, np.float32)
    _unrotate(x, cos, sin, interleaved, out)
    return out


def rotate(
    x: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    dtype: Any,
) -> NDArray[Any]:
    """Undo `unrotate`, to float32 or to bfloat16 bits (uint16), held at the largest finite number."""
    out = np.empty(x.shape, dtype)
    _rotate(x, cos, sin, interleaved, out)
    return out
