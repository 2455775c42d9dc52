"""The definition of rotation and its undoing: every product and sum rounds to float32, none are fused.

Pair i of a head are its values i and ``i + pairs``, or ``2 i`` and ``2 i + 1`` if interleaved; what follows the last
pair does not rotate.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen


def pair_indices(pairs: int, interleaved: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first and second members of the pairs, each ``[pairs]``."""
    i = np.arange(pairs)
    return (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)


def unrotate(
    x: NDArray[Any], cos: NDArray[np.float32], sin: NDArray[np.float32], interleaved: bool
) -> NDArray[np.float32]:
    """Turn ``[layers, tokens, heads, dim]`` back by the angles of the tokens; float32.

    Args:
        x: float32, or uint16 holding bfloat16 bits.
        cos: ``[tokens, pairs]``, from `tables`.
        sin: The same.
        interleaved: How pairs lie.
    """
    wide = widen(x)
    out = wide.copy()
    first, second = pair_indices(cos.shape[1], interleaved)
    a, b = wide[..., first], wide[..., second]
    c, s = cos[:, None], sin[:, None]
    out[..., first] = a * c + b * s
    out[..., second] = b * c - a * s
    return out


def rotate(
    x: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    dtype: Any,
) -> NDArray[Any]:
    """Turn ``[layers, tokens, heads, dim]`` by the angles of the tokens, to float32 or bfloat16 bits (uint16)."""
    out = x.copy()
    first, second = pair_indices(cos.shape[1], interleaved)
    a, b = x[..., first], x[..., second]
    c, s = cos[:, None], sin[:, None]
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return narrow(out, dtype)
