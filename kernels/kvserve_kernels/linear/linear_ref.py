"""The definition of the linear transform: integers and single float32 operations, none fused.

`forward` is `prepare` and `quantise` group by group and has one result bit by bit; `inverse` is `expand` and `finish`,
of which `expand` may sum in any order.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen
from kvserve_kernels.linear.plan import MAX_LEVEL, MAX_SHIFT, Group, Plan
from kvserve_kernels.rotate import rotate_ref

_LARGEST_HALF = np.float32(65504)


def prepare(
    native: NDArray[Any],
    group: Group,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
) -> tuple[NDArray[np.int8], NDArray[np.int8]] | None:
    """Gather a group, turn its keys back, centre, scale and round to int8 with a shift for each token.

    Args:
        native: ``[rows, tokens, heads, dim]`` float16, float32, or uint16 holding bfloat16 bits; finite.
        group: What to gather.
        cos: ``[rotations, tokens, pairs]`` of `rotate.tables`, to undo.
        sin: The same.
        interleaved: How pairs lie.

    Returns:
        ``x8 [tokens, W]`` and ``e [tokens]``, int8: ``x8 · 2^e`` is the scaled value, e the least integer from 0 on
        that makes magnitudes at most 127 before rounding; None if 31 is not enough or float32 overflows.
    """
    tokens, dim = native.shape[1], native.shape[3]
    x = np.empty((tokens, group.rows.size, dim), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for s, (row, head, table) in enumerate(
            zip(group.rows, group.heads, group.rotations, strict=True)
        ):
            part = native[row : row + 1, :, head : head + 1]
            part = part.astype(np.float32) if part.dtype == np.float16 else widen(part)
            if table >= 0:
                part = rotate_ref.unrotate(part, cos[table], sin[table], interleaved)
            x[:, s] = part[0, :, 0]
        scaled = (x.reshape(tokens, -1) - group.mean) * group.inv_scale
    peaks = np.abs(scaled).max(axis=1).astype(np.float64)
    if not (peaks <= 127 * 2.0**MAX_SHIFT).all():
        return None
    bounds = 127 * 2.0 ** np.arange(MAX_SHIFT + 1)
    e = np.searchsorted(bounds, peaks).astype(np.int8)
    x8 = np.rint(scaled * np.ldexp(np.float32(1), -e.astype(np.int32))[:, None]).astype(np.int8)
    return x8, e


def quantise(x8: NDArray[np.int8], e: NDArray[np.int8], group: Group) -> NDArray[np.int16]:
    """Return the levels ``[C, tokens]`` of ``x8 [tokens, W]`` with shifts ``e [tokens]``."""
    y = group.matrix.astype(np.int64) @ x8.astype(np.int64).T << e.astype(np.int64)
    magnitude = np.abs(y).astype(np.float32) * group.factor[:, None] + group.offset[:, None]
    levels = np.floor(np.minimum(magnitude, np.float32(MAX_LEVEL)))
    signed: NDArray[np.int16] = (np.sign(y) * levels).astype(np.int16)
    return signed


def expand(q: NDArray[np.int16], group: Group) -> NDArray[np.float32]:
    """Return the centred values ``[tokens, W]`` float32 of levels ``[C, tokens]``."""
    wide = q.astype(np.float32)
    r = np.sign(wide) * ((np.abs(wide) + group.delta[:, None]) * np.float32(group.unit))
    r, inverse = widen(narrow(r, np.uint16)), widen(group.inverse_bits)
    return (r.T.astype(np.float64) @ inverse.astype(np.float64)).astype(np.float32)


def finish(
    x: NDArray[np.float32],
    group: Group,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    out: NDArray[Any],
) -> None:
    """Add the means, turn keys, and write a group into ``out [rows, tokens, heads, dim]``.

    Numbers round to nearest even, those beyond the largest finite one of the type of ``out`` to that.

    Args:
        x: ``[tokens, W]``.
        group: Where to write.
        cos: ``[rotations, tokens, pairs]`` of `rotate.tables`, to rotate.
        sin: The same.
        interleaved: How pairs lie.
        out: float16, float32, or uint16 for bfloat16 bits.
    """
    tokens, dim = out.shape[1], out.shape[3]
    whole = (x + group.mean).reshape(tokens, -1, dim)
    for s, (row, head, table) in enumerate(
        zip(group.rows, group.heads, group.rotations, strict=True)
    ):
        part = np.ascontiguousarray(whole[None, :, s, None])
        if table >= 0:
            part = rotate_ref.rotate(part, cos[table], sin[table], interleaved, np.float32)
        if out.dtype == np.float16:
            part = np.clip(part, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
        else:
            part = narrow(part, out.dtype)
        out[row, :, head] = part[0, :, 0]


def forward(
    native: NDArray[Any],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
) -> NDArray[np.int16] | None:
    """Return the levels ``[components, tokens]`` of a piece, or None; see `prepare`."""
    levels = np.empty((plan.components, native.shape[1]), np.int16)
    for group, start in zip(plan.groups, plan.starts, strict=False):
        prepared = prepare(native, group, cos, sin, interleaved)
        if prepared is None:
            return None
        levels[start : start + group.components] = quantise(*prepared, group)
    return levels


def inverse(
    levels: NDArray[np.int16],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    out: NDArray[Any],
) -> None:
    """Write what levels ``[components, tokens]`` stand for into a piece; see `finish`."""
    for group, start in zip(plan.groups, plan.starts, strict=False):
        x = expand(levels[start : start + group.components], group)
        finish(x, group, cos, sin, interleaved, out)
