"""The means of a piece: what ``transform.recentre.v1`` writes, and the matrices with these means.

The means of a piece's values, keys turned back, are one token, which the projection maps to levels of all components
like any other, by the stage's step. What the levels stand for is added to the calibrated means of the channels: so the
quantiser sees components without their means, and the decoder adds them in the pass that adds the calibrated ones. Both
sides find the same means to the bit.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ValuesError
from kvserve_kernels import linear
from kvserve_kernels.mean import Turning, combine, token_means
from kvserve_strategies import projection
from kvserve_strategies.bundle import Rope
from kvserve_strategies.ladder import decode_levels, encode_levels
from kvserve_strategies.matrices import Matrices
from kvserve_strategies.projection import Projection
from kvserve_strategies.stage import Array, Bytes, Spec
from kvserve_strategies.stages.recentre import ROW, Recentre, rows_of
from kvserve_strategies.turns import rope_turns

_LARGEST: Final = 2.0**80
_ENOUGH: Final = 256
"""Tokens that means are of, at least, in a piece that has so many: more would hardly change them, and cost time."""
_KEPT: Final = 4
"""Weights that are kept: chunks of the same tokens follow each other, and those of a large model take megabytes."""


def encode(
    stage: Recentre, folded: Projection, native: linear.Cells, spec: Spec
) -> tuple[tuple[Array, ...], Projection]:
    """Return the stage's section, and the projection with the piece's means.

    Args:
        stage: The stage.
        folded: The stages around it.
        native: ``[rows, tokens, heads, dim]``.
        spec: Of the values.

    Raises:
        ValuesError: A value is NaN, infinite or too large.
        StrategyError: There is no calibration for this piece.
    """
    matrices = folded.matrices(spec)
    means = _means(matrices, native, spec)
    count = len(matrices.ropes)
    cos, sin, interleaved = rope_turns(matrices.ropes, range(1), undo=True)
    still = np.ones((count, 1, cos.shape[2]), np.float32), np.zeros_like(sin)
    levels = linear.forward(means, matrices.means_plan(stage.step), *still, interleaved)
    if levels is None:
        raise ValuesError("a value is NaN, infinite, or too far from what calibration saw")
    rows = np.zeros((rows_of(len(levels)), ROW), np.int16)
    rows.reshape(-1)[: len(levels)] = levels[:, 0]
    return encode_levels(rows), folded.with_means(_moved(matrices, levels[:, 0], stage.step))


def decode(stage: Recentre, folded: Projection, section: Bytes, spec: Spec) -> Projection:
    """Return the projection with the means of the piece that wrote a section.

    Raises:
        WireError: The section is not what `encode` writes.
    """
    matrices = folded.matrices(spec)
    count = sum(base.components for base in matrices.bases)
    levels = decode_levels(section, rows_of(count), ROW).reshape(-1)[:count]
    return folded.with_means(_moved(matrices, levels, stage.step))


def _means(matrices: Matrices, native: linear.Cells, spec: Spec) -> NDArray[np.float32]:
    """Return the means of a piece as a piece of one token, ``[rows, 1, heads, dim]``."""
    halves = native if isinstance(native, tuple) else (native,)
    rows, tokens, heads, dim = halves[0].shape
    stride = max(1, tokens // _ENOUGH)
    chosen = slice(None, None, stride)
    tables = {
        int(row): int(table)
        for base in matrices.bases
        for row, table in zip(base.rows, base.rotations, strict=True)
    }
    turnings = _turnings(matrices.ropes, projection.positions(spec), stride, heads, dim)
    means = np.empty((rows * len(halves), 1, heads, dim), np.float32)
    for row in range(len(means)):
        table = tables.get(row, -1)
        values = halves[row // rows][row % rows, chosen]
        means[row, 0] = token_means(values, None if table < 0 else turnings[table])
    return means


@lru_cache(maxsize=_KEPT)
def _turnings(
    ropes: tuple[Rope, ...], at: range, stride: int, heads: int, dim: int
) -> tuple[Turning, ...]:
    """Return how keys turn by each rotation, for every so many positions; the same for all layers of a piece."""
    cos, sin, interleaved = rope_turns(ropes, at, undo=True)
    return tuple(
        Turning.of(*each, interleaved, heads, dim)
        for each in zip(cos[:, ::stride], sin[:, ::stride], strict=True)
    )


def _moved(
    matrices: Matrices, levels: NDArray[np.int16], step: float
) -> tuple[NDArray[np.float32], ...]:
    """Return the means of each block's channels that levels of all components stand for."""
    moved = []
    at = 0
    for base in matrices.bases:
        shift = combine(levels[at : at + base.components], base.inverse_bits) * step
        at += base.components
        # a hostile section can name any level
        mean = np.clip(base.mean.astype(np.float64) + shift, -_LARGEST, _LARGEST)
        moved.append(mean.astype(np.float32))
    return tuple(moved)
