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
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_kernels.linear import Plan
from kvserve_strategies import projection
from kvserve_strategies.entropy import decode_integers, encode_integers
from kvserve_strategies.ladder import coded_nbytes, decode_levels, encode_levels
from kvserve_strategies.projection import Matrices, Projection
from kvserve_strategies.stage import Array, Bytes, Spec
from kvserve_strategies.stages.importance import Importance, most_blocks
from kvserve_strategies.stages.pca import Block

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


def encode(folded: Projection, native: Array, spec: Spec) -> Encoded:
    """Code a piece.

    Args:
        folded: The stages, the last of them `Importance`.
        native: ``[rows, tokens, heads, dim]``.
        spec: Of the values.

    Raises:
        ValuesError: A value is too large.
        StrategyError: There is no calibration for this piece.
    """
    matrices = folded.matrices(spec)
    start = projection.positions(spec).start
    classes = np.empty((len(matrices.blocks), spec.tokens), np.uint8)
    bodies: list[tuple[Array, ...]] = []
    for block, cells in enumerate(matrices.blocks):
        part = _take(native, cells)
        classes[block] = _classes(matrices, block, part, spec)
        order, runs = _sorted(classes[block])
        part = np.take(part, order, axis=1)
        for rank, at in runs:
            plan = _plan(folded, matrices, block, rank)
            chosen = slice(at.start, at.stop)
            levels = projection.forward(plan, matrices, part[:, chosen], order[chosen] + start)
            bodies.append(encode_levels(levels))
    lengths = [sum(piece.nbytes for piece in body) for body in bodies]
    pieces: list[Array] = [np.array(lengths, np.uint64)]
    for body, length in zip(bodies, lengths, strict=True):
        pieces += [*body, np.zeros(-length % 8, np.uint8)]
    coded = encode_integers(np.ascontiguousarray(classes.T)[None], max_tables=_TABLES)
    return Encoded(coded, tuple(pieces))


def decode(folded: Projection, classes: Bytes, bodies: Bytes, spec: Spec) -> Array:
    """Undo `encode`.

    Raises:
        WireError: The sections are not what `encode` writes.
    """
    matrices = folded.matrices(spec)
    shape = (1, spec.tokens, len(matrices.blocks))
    ranks = decode_integers(classes, shape=shape, dtype=np.dtype(np.uint8))[0].T
    if ranks.max() > MOST - LEAST:
        raise _malformed(f"a class of {ranks.max()}")
    sorted_blocks = [_sorted(block) for block in ranks]
    count = sum(len(runs) for _, runs in sorted_blocks)
    if bodies.size < 8 * count:
        raise _malformed(f"{bodies.size} bytes can't hold {count} lengths")
    lengths = iter(bodies[: 8 * count].view(np.uint64).tolist())
    out = np.empty(spec.shape, spec.array_dtype)
    start = projection.positions(spec).start
    at = 8 * count
    for block, (order, runs) in enumerate(sorted_blocks):
        cells = matrices.blocks[block]
        shape_of_block = (len(cells.rows), spec.tokens, len(cells.heads), spec.head_dim)
        part = np.empty(shape_of_block, spec.array_dtype)
        for rank, tokens in runs:
            length = next(lengths)
            end = at + length + -length % 8
            if end > bodies.size or bodies[at + length : end].any():
                raise _malformed(f"a body of {length} bytes at {at} of {bodies.size}")
            plan = _plan(folded, matrices, block, rank)
            levels = decode_levels(bodies[at : at + length], plan.components, len(tokens))
            chosen = slice(tokens.start, tokens.stop)
            projection.inverse(plan, matrices, levels, order[chosen] + start, part[:, chosen])
            at = end
        _put(out, cells, np.take(part, np.argsort(order), axis=1))
    if at != bodies.size:
        raise _malformed(f"{bodies.size - at} bytes too many")
    return out


def _plan(folded: Projection, matrices: Matrices, block: int, rank: int) -> Plan:
    quantiser = folded.quantiser
    step = quantiser.step / 2 ** ((rank + LEAST) / 2)
    return matrices.block_plan(block, step, quantiser.dead_zone)


def _sorted(ranks: NDArray[np.uint8]) -> tuple[NDArray[np.int64], list[tuple[int, range]]]:
    """Return the tokens of a block by class, and for each class which of those it has.

    The most important class comes first; tokens of one class are in their order.
    """
    order = np.argsort(-ranks.astype(np.int64), kind="stable")
    values, firsts = np.unique(-ranks[order].astype(np.int64), return_index=True)
    bounds = [*firsts.tolist(), len(order)]
    return order, [
        (-int(value), range(first, stop))
        for value, first, stop in zip(values, bounds, bounds[1:], strict=False)
    ]


def _take(native: Array, cells: Block) -> Array:
    """Return the values of a block, contiguous."""
    rows = [native[row][:, list(cells.heads)] for row in cells.rows]
    if len(cells.heads) == native.shape[2]:
        rows = [native[row] for row in cells.rows]
    return np.stack(rows)


def _put(out: Array, cells: Block, part: Array) -> None:
    """Undo `_take`."""
    whole = len(cells.heads) == out.shape[2]
    for row, values in zip(cells.rows, part, strict=True):
        if whole:
            out[row] = values
        else:
            out[row][:, list(cells.heads)] = values


def _classes(matrices: Matrices, block: int, native: Array, spec: Spec) -> NDArray[np.uint8]:
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


def _scores(matrices: Matrices, block: int, native: Array, spec: Spec) -> NDArray[np.int64]:
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
