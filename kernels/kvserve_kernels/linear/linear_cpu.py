"""The linear transform on the CPU: by the native library where processor and library have it, else portable."""

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.linear import linear_native, portable
from kvserve_kernels.linear.linear_native import Level
from kvserve_kernels.linear.plan import Cells, Plan, halves_of


def forward(
    native: Cells,
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
) -> NDArray[np.int16] | None:
    """Map the values of a piece to levels; the same bits on every machine.

    Args:
        native: ``[rows, tokens, heads, dim]`` float16, float32, or uint16 holding bfloat16 bits; the last dimension
            contiguous. For keys and values together all rows of keys come first.
        plan: The groups; cells that are in none are not read.
        cos: ``[rotations, tokens, pairs]`` of `rotate.tables`, to undo; ``[0, tokens, 0]`` if nothing turns.
        sin: The same.
        interleaved: How pairs lie.

    Returns:
        ``[components, tokens]`` int16, magnitudes at most ``MAX_LEVEL``; None if a value is NaN, infinite, 2^31 times
        larger than what fills int8, or exceeds float32 on the way.
    """
    check(native, plan, cos, sin)
    level = linear_native.level()
    if level >= Level.INT8_DOTS:
        return linear_native.forward(native, plan, cos, sin, interleaved, level)
    whole = np.concatenate(native) if isinstance(native, tuple) else native
    return portable.forward(whole, plan, cos, sin, interleaved)


def inverse(
    levels: NDArray[np.int16],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    out: Cells,
) -> None:
    """Write what levels stand for into a piece; sums may round differently from machine to machine.

    Args:
        levels: ``[components, tokens]`` int16, contiguous.
        plan: The groups; cells of ``out`` that are in none are left.
        cos: ``[rotations, tokens, pairs]`` of `rotate.tables`, to rotate.
        sin: The same.
        interleaved: How pairs lie.
        out: ``[rows, tokens, heads, dim]`` float16, float32, or uint16 for bfloat16 bits; the last dimension
            contiguous. Values round to nearest even and are held at the largest finite number.
    """
    tokens = check(out, plan, cos, sin)
    if levels.shape != (plan.components, tokens) or levels.dtype != np.int16:
        raise ValueError(f"levels must be int16 {(plan.components, tokens)}")
    level = linear_native.level()
    if level >= Level.INT8_DOTS:
        linear_native.inverse(levels, plan, cos, sin, interleaved, out, level)
    elif isinstance(out, tuple):
        whole = np.concatenate(out)
        portable.inverse(levels, plan, cos, sin, interleaved, whole)
        for half, part in zip(out, np.split(whole, 2), strict=True):
            half[...] = part
    else:
        portable.inverse(levels, plan, cos, sin, interleaved, out)


def check(cells: Cells, plan: Plan, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> int:
    """Refuse what would make a kernel read or write outside an array; return the tokens."""
    halves = halves_of(cells)
    piece = halves[0]
    rows, tokens, heads, dim = piece.shape
    rows *= len(halves)
    needed = plan.least_shape
    if (
        rows < needed[0]
        or heads < needed[1]
        or dim != plan.dim
        or piece.strides[3] != piece.itemsize
    ):
        raise ValueError(f"the plan does not fit {piece.shape}")
    if piece.dtype not in (np.uint16, np.float16, np.float32):
        raise ValueError(f"cache values can't be {piece.dtype}")
    if (
        cos.shape != sin.shape
        or cos.shape[0] < needed[2]
        or cos.shape[1] != tokens
        or 2 * cos.shape[2] > dim
        or not cos.dtype == sin.dtype == np.float32
    ):
        raise ValueError(f"the tables {cos.shape} do not fit {piece.shape}")
    return int(tokens)
