"""Levels by a step that follows each token's importance: what ``quantise.importance.v1`` and the coder after it write.

In each block of layers and heads every token has a class; tokens of a class are coded together with its step. The
classes are in the quantiser's section. The coder's section holds for each block and each of its classes, the most
important first, the length (u64) of the body, then the bodies as `kvserve_strategies.ladder` writes them, each followed
by zeros to a multiple of 8.

The encoder predicts the logarithm of a token's importance as a linear function of features: its leading components in
deviations, clipped at 4, then with a = tokens to the end of the request, 1 for the last: ``ln(a) / 7``, its square,
``exp(-(a - 1) / 4)``, ``exp(-(a - 1) / 32)``, and 1. Sums are of integers, so that every processor finds the same
classes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_kernels import fused
from kvserve_kernels.linear import Cells, Plan
from kvserve_strategies import projection
from kvserve_strategies.entropy import decode_integers, encode_integers
from kvserve_strategies.ladder import coded_nbytes, decode_levels, encode_levels
from kvserve_strategies.matrices import Matrices
from kvserve_strategies.projection import Projection
from kvserve_strategies.stage import Array, Bytes, Spec
from kvserve_strategies.stages.importance import Importance, most_blocks
from kvserve_strategies.stages.pca import Block
from kvserve_strategies.turns import rope_turns

LEAST: Final = -6
MOST: Final = 10
GROUP: Final = 32
"""Tokens of successive rank that get one class; the lanes of the coder."""
_AGE_FEATURES: Final = 5
_RESOLUTION: Final = 16
_CLIP: Final = 4 * _RESOLUTION
_ONE: Final = 1 << 16
_TABLES: Final = 16


class Encoded(NamedTuple):
    """What the two stages write."""

    classes: tuple[Array, ...]
    bodies: tuple[Array, ...]


def most_body_bytes(spec: Spec) -> int:
    """Return the most bytes of all bodies, for the spec of the levels."""
    bodies = min(most_blocks(spec) * (MOST - LEAST + 1), most_blocks(spec) * spec.tokens)
    return bodies * (coded_nbytes(0) + 16) + 2 * spec.count


def encode(folded: Projection, native: Cells, spec: Spec) -> Encoded:
    """Code a piece.

    Args:
        folded: The stages, the last of them `Importance`.
        native: ``[rows, tokens, heads, dim]``.
        spec: Of the values.

    Raises:
        ValuesError: A value is NaN, infinite or too large.
        StrategyError: There is no calibration for this piece.
    """
    matrices = folded.matrices(spec)
    # what matters was learnt of components about the calibrated means
    calibrated = folded.with_means(None).matrices(spec)
    classes = np.empty((len(matrices.blocks), spec.tokens), np.uint8)
    lengths: list[NDArray[np.int64]] = []
    bodies: list[Array] = []
    for block in range(len(matrices.blocks)):
        classes[block] = _classes(calibrated, block, native, spec)
        runs = _runs(folded, matrices, block, classes[block])
        coded = None
        if fused.available():
            turns = rope_turns(matrices.ropes, projection.positions(spec), undo=True)
            coded = fused.encode_runs(native, runs.plans, runs.order, runs.starts, *turns)
        body, length = coded or _encode_runs(matrices, block, native, runs, spec)
        bodies.append(body)
        lengths.append(length)
    coded_classes = encode_integers(np.ascontiguousarray(classes.T)[None], max_tables=_TABLES)
    return Encoded(coded_classes, (np.concatenate(lengths).astype(np.uint64), *bodies))


def decode(folded: Projection, classes: Bytes, bodies: Bytes, spec: Spec, out: Cells) -> None:
    """Undo `encode` into ``[rows, tokens, heads, dim]``.

    Raises:
        WireError: The sections are not what `encode` writes.
    """
    matrices = folded.matrices(spec)
    shape = (1, spec.tokens, len(matrices.blocks))
    ranks = decode_integers(classes, shape=shape, dtype=np.dtype(np.uint8))[0].T
    if ranks.max() > MOST - LEAST:
        raise _malformed(f"a class of {ranks.max()}")
    blocks = [_runs(folded, matrices, block, each) for block, each in enumerate(ranks)]
    count = sum(len(runs.plans) for runs in blocks)
    if bodies.size < 8 * count:
        raise _malformed(f"{bodies.size} bytes can't hold {count} lengths")
    announced = iter(bodies[: 8 * count].view(np.uint64).tolist())
    turns = rope_turns(matrices.ropes, projection.positions(spec), undo=False)
    at = 8 * count
    for block, runs in enumerate(blocks):
        start, lengths = at, []
        for _ in runs.plans:
            length = next(announced)
            end = at + length + -length % 8
            if end > bodies.size or bodies[at + length : end].any():
                raise _malformed(f"a body of {length} bytes at {at} of {bodies.size}")
            lengths.append(length)
            at = end
        if not fused.available():
            _decode_runs(matrices, block, bodies[start:at], lengths, runs, spec, out)
        elif not fused.decode_runs(
            bodies[start:at], np.array(lengths), runs.plans, runs.order, runs.starts, *turns, out
        ):
            raise _malformed("a body is not what an encoder writes")
    if at != bodies.size:
        raise _malformed(f"{bodies.size - at} bytes too many")


def _encode_runs(
    matrices: Matrices, block: int, native: Cells, runs: "_Runs", spec: Spec
) -> tuple[Array, NDArray[np.int64]]:
    """Do as `fused.encode_runs`."""
    part = _take(native, matrices.blocks[block], runs.order)
    start = projection.positions(spec).start
    pieces: list[Array] = []
    lengths = []
    for plan, chosen in zip(runs.plans, runs.spans, strict=True):
        levels = projection.forward(plan, matrices, part[:, chosen], runs.order[chosen] + start)
        body = encode_levels(levels)
        length = sum(piece.nbytes for piece in body)
        lengths.append(length)
        pieces += [piece.reshape(-1).view(np.uint8) for piece in body]
        pieces.append(np.zeros(-length % 8, np.uint8))
    return np.concatenate(pieces), np.array(lengths)


def _decode_runs(
    matrices: Matrices,
    block: int,
    bodies: Bytes,
    lengths: Sequence[int],
    runs: "_Runs",
    spec: Spec,
    out: Cells,
) -> None:
    """Do as `fused.decode_runs`."""
    part = np.empty(spec.shape, spec.array_dtype)
    start = projection.positions(spec).start
    at = 0
    for plan, chosen, length in zip(runs.plans, runs.spans, lengths, strict=True):
        tokens = chosen.stop - chosen.start
        levels = decode_levels(bodies[at : at + length], plan.components, tokens)
        projection.inverse(plan, matrices, levels, runs.order[chosen] + start, part[:, chosen])
        at += length + -length % 8
    _put(out, matrices.blocks[block], runs.order, part)


class _Runs(NamedTuple):
    """The tokens of a block by class, the most important first; tokens of one class are in their order.

    Attributes:
        order: ``[tokens]`` int64.
        starts: Where in the order each class starts, and the end.
        plans: For each class its plan.
    """

    order: NDArray[np.int64]
    starts: list[int]
    plans: list[Plan]

    @property
    def spans(self) -> list[slice]:
        """The part of the order of each class."""
        return [slice(start, stop) for start, stop in pairwise(self.starts)]


def _runs(folded: Projection, matrices: Matrices, block: int, ranks: NDArray[np.uint8]) -> _Runs:
    falling = MOST - LEAST - ranks.astype(np.int64)
    order = np.argsort(falling, kind="stable")
    values, firsts = np.unique(falling[order], return_index=True)
    plans = [_plan(folded, matrices, block, MOST - LEAST - int(value)) for value in values]
    return _Runs(order, [*firsts.tolist(), len(order)], plans)


def _plan(folded: Projection, matrices: Matrices, block: int, rank: int) -> Plan:
    quantiser = folded.quantiser
    step = quantiser.step / 2 ** ((rank + LEAST) / 2)
    return matrices.block_plan(block, step, quantiser.dead_zone)


def _take(native: Cells, cells: Block, order: NDArray[np.int64]) -> Array:
    """Return the values of a block with its tokens in an order; where the rows of other blocks are, anything."""
    halves = native if isinstance(native, tuple) else (native,)
    rows, *rest = halves[0].shape
    part = np.empty((rows * len(halves), *rest), halves[0].dtype)
    for row in cells.rows:
        np.take(halves[row // rows][row % rows], order, axis=0, out=part[row])
    return part


def _put(out: Cells, cells: Block, order: NDArray[np.int64], part: Array) -> None:
    """Write the values of a block back."""
    halves = out if isinstance(out, tuple) else (out,)
    rows = halves[0].shape[0]
    heads = list(cells.heads)
    for row in cells.rows:
        halves[row // rows][row % rows][order[:, None], heads] = part[row][:, heads]


def _classes(matrices: Matrices, block: int, native: Cells, spec: Spec) -> NDArray[np.uint8]:
    """Return the class of each token in a block."""
    if not matrices.importance:
        raise StrategyError(
            Importance.id,
            "the bundle's basis has not learnt what tokens matter: use the fisher metric",
        )
    scores = _scores(matrices, block, native, spec)
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(spec.tokens, np.uint8)
    for first in range(0, spec.tokens, GROUP):
        chosen = order[first : first + GROUP]
        mean = int(scores[chosen].sum()) / (len(chosen) * _ONE * math.log(2))
        ranks[chosen] = min(max(round(mean), LEAST), MOST) - LEAST
    return ranks


def _scores(matrices: Matrices, block: int, native: Cells, spec: Spec) -> NDArray[np.int64]:
    """Return the logarithm of each token's importance, in 1/65536."""
    assert spec.where is not None
    weights = matrices.importance[block].astype(np.float64)
    count = min(len(weights) - _AGE_FEATURES, len(matrices.sigmas[block]))
    plan = matrices.leading_plan(block, count, _RESOLUTION)
    levels = projection.forward(plan, matrices, native, projection.positions(spec))
    leading = np.rint(weights[:count] * (_ONE / _RESOLUTION)).astype(np.int64)
    parts = np.clip(levels, -_CLIP, _CLIP).astype(np.int64)
    age = np.arange(spec.tokens, 0, -1, dtype=np.float64) + spec.where.tokens_after
    far = np.log(age) / 7
    terms = np.stack(
        [far, far * far, np.exp((1 - age) / 4), np.exp((1 - age) / 32), np.ones_like(age)]
    )
    ages = np.rint((weights[-_AGE_FEATURES:] @ terms) * _ONE).astype(np.int64)
    scores: NDArray[np.int64] = leading @ parts + ages
    return scores


def _malformed(detail: str) -> WireError:
    return WireError(WireReason.MALFORMED, f"{Importance.id}: {detail}")
