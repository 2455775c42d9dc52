"""Cache values to sections of ``code.ladder.v1`` and back without a matrix of all levels between.

What is written is what `kvserve_kernels.linear` and `kvserve_kernels.ladder` give one after the other, in the bytes
that `kvserve_strategies.ladder` defines. The levels of one group stay in the second cache while they are coded, and
Python is called once for a piece. Where processor or library can't do it, callers take those two steps.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import ladder
from kvserve_kernels.ladder.ladder_cpu import native_prices
from kvserve_kernels.linear import linear_native
from kvserve_kernels.linear.linear_cpu import check
from kvserve_kernels.linear.linear_native import About, Level
from kvserve_kernels.linear.plan import Cells, Plan
from kvserve_kernels.native import coder, simd

MOST_RUNS: Final = 64
_HEAD_BYTES: Final = 12
Real = NDArray[np.float32]


class _Status(IntEnum):
    DONE = 0
    REFUSED = 1
    NO_MEMORY = 2
    OTHERWISE = 3
    MALFORMED = 4


class _Ladder(ctypes.Structure):
    """What ``Ladder`` in sections.h is."""

    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("prices", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("most_low_bits", ctypes.c_int64),
    )


def available() -> bool:
    """Return whether the functions here can be called."""
    return linear_native.level() >= Level.INT8_DOTS


def encode(
    native: Cells, plan: Plan, cos: Real, sin: Real, interleaved: bool, groups: int
) -> NDArray[np.uint8] | None:
    """Code a piece as one section.

    Args:
        native: As in `kvserve_kernels.linear.forward`, like the three after it.
        plan: The groups; their components are the channels, at least one.
        cos: The rotations.
        sin: The same.
        interleaved: How pairs lie.
        groups: Groups of 32 tokens a stream: what the section's format asks for if enough channels are not all zero.

    Returns:
        The section; None if a value is too large, or another number of groups or plain levels would have been right.

    Raises:
        MemoryError: There is none for scratch arrays.
    """
    tokens = check(native, plan, cos, sin)
    about = About(native, cos, sin, interleaved)
    out = np.empty(_HEAD_BYTES + 2 * plan.components * tokens, np.uint8)
    nbytes = ctypes.c_int64()
    packed = linear_native.packed(plan)
    status = _library().kvserve_fused_encode(
        linear_native.level(), int(simd()), ctypes.byref(about.piece), packed, len(packed), groups,
        ctypes.byref(_ladder()), out.ctypes.data, ctypes.byref(nbytes),
    )  # fmt: skip
    return out[: nbytes.value] if _is_done(status) else None


def decode(
    section: NDArray[np.uint8], plan: Plan, cos: Real, sin: Real, interleaved: bool, out: Cells
) -> bool:
    """Undo `encode`, or what the two steps wrote.

    Args:
        section: The bytes, aligned to 4; anything may be in them.
        plan: As in `kvserve_kernels.linear.inverse`, like the others.
        cos: The rotations.
        sin: The same.
        interleaved: How pairs lie.
        out: Where values go; if the result is False, anything finite may be there.

    Returns:
        Whether the section is one that an encoder writes.

    Raises:
        MemoryError: There is none for scratch arrays.
    """
    check(out, plan, cos, sin)
    about = About(out, cos, sin, interleaved)
    packed = linear_native.packed(plan)
    status = _library().kvserve_fused_decode(
        linear_native.level(), int(simd()), ctypes.byref(about.piece), packed, len(packed),
        ctypes.byref(_ladder()), section.ctypes.data, section.size,
    )  # fmt: skip
    return _is_done(status)


def encode_runs(
    native: Cells,
    plans: Sequence[Plan],
    order: NDArray[np.int64],
    starts: Sequence[int],
    cos: Real,
    sin: Real,
    interleaved: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """Code the tokens of a piece run by run, each by a plan of its own, as one section each.

    Args:
        native: As in `kvserve_kernels.linear.forward`.
        plans: For each run a plan of one group; all share one base. At most ``MOST_RUNS``.
        order: The piece's tokens, each once.
        starts: ``[runs + 1]``: where in the order each run starts, and the end.
        cos: The rotations of the piece's tokens, as they come in it.
        sin: The same.
        interleaved: How pairs lie.

    Returns:
        The sections, each followed by zeros to a multiple of 8, and the length of each; None if a value is too large.

    Raises:
        MemoryError: There is none for scratch arrays.
    """
    runs = _Runs(native, plans, order, starts, cos, sin, interleaved)
    out = np.empty(runs.most_bytes, np.uint8)
    lengths = np.zeros(len(plans), np.int64)
    status = _library().kvserve_fused_encode_runs(
        *runs.arguments, ctypes.byref(_ladder()), out.ctypes.data, lengths.ctypes.data
    )
    return (out[: int((-(-lengths // 8) * 8).sum())], lengths) if _is_done(status) else None


def decode_runs(
    sections: NDArray[np.uint8],
    lengths: NDArray[np.int64],
    plans: Sequence[Plan],
    order: NDArray[np.int64],
    starts: Sequence[int],
    cos: Real,
    sin: Real,
    interleaved: bool,
    out: Cells,
) -> bool:
    """Undo `encode_runs`; what is not said here is as there, or in `decode`.

    Args:
        sections: The sections, each at a multiple of 8 and followed by what fills it up to one.
        lengths: ``[runs]``: the length of each.
        plans: The plans.
        order: The tokens.
        starts: The runs.
        cos: The rotations.
        sin: The same.
        interleaved: How pairs lie.
        out: Where values go.

    Raises:
        ValueError: The sections are shorter than the lengths say.
    """
    runs = _Runs(out, plans, order, starts, cos, sin, interleaved)
    if lengths.min() < 0 or (-(-lengths // 8) * 8).sum() != sections.size:
        raise ValueError("the sections do not fit their lengths")
    held = np.ascontiguousarray(lengths, np.int64)
    status = _library().kvserve_fused_decode_runs(
        *runs.arguments, ctypes.byref(_ladder()), sections.ctypes.data, held.ctypes.data
    )
    return _is_done(status)


class _Runs:
    """What the two functions of runs hand to C, and the arrays that it points into."""

    def __init__(
        self,
        cells: Cells,
        plans: Sequence[Plan],
        order: NDArray[np.int64],
        starts: Sequence[int],
        cos: Real,
        sin: Real,
        interleaved: bool,
    ) -> None:
        for plan in plans:
            tokens = check(cells, plan, cos, sin)
        base = plans[0].groups[0].base or plans[0].groups[0]
        bounds = np.array(starts, np.int64)
        if not 0 < len(plans) <= MOST_RUNS or any(
            len(plan.groups) != 1 or (plan.groups[0].base or plan.groups[0]) is not base
            for plan in plans
        ):
            raise ValueError(f"runs need 1 to {MOST_RUNS} plans of one group of one base")
        if (
            bounds.size != len(plans) + 1
            or bounds[0] != 0
            or bounds[-1] != order.size
            or (np.diff(bounds) < 1).any()
            or order.min() < 0
            or order.max() >= tokens
        ):
            raise ValueError("the runs do not fit the tokens")
        about = About(cells, cos, sin, interleaved, np.ascontiguousarray(order, np.int32))
        packed = [linear_native.packed(plan) for plan in plans]
        groups = (type(packed[0][0]) * len(plans))(*(groups[0] for groups in packed))
        self._held = (about, packed, groups, bounds)
        sizes = [plan.components * n for plan, n in zip(plans, np.diff(bounds), strict=True)]
        self.most_bytes = int(2 * sum(sizes) + (_HEAD_BYTES + 8) * len(plans))
        self.arguments = (
            linear_native.level(), int(simd()), ctypes.byref(about.piece), groups, bounds.ctypes.data, len(plans),
        )  # fmt: skip


@cache
def _ladder() -> _Ladder:
    tables = ladder.tables()
    return _Ladder(
        tables.native(_library()).ctypes.data,
        native_prices().ctypes.data,
        len(tables.models),
        int(tables.low_bits.max()),
    )


def _library() -> ctypes.CDLL:
    library = coder()
    assert library is not None
    return library


def _is_done(status: int) -> bool:
    if status == _Status.NO_MEMORY:
        raise MemoryError
    return status == _Status.DONE
