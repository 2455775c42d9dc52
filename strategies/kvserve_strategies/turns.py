"""How the keys of a piece turn with their positions: which rotations there are, and their tables."""

from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import Kind
from kvserve_strategies.bundle import Bundle, Rope
from kvserve_strategies.stage import Where
from kvserve_strategies.stages.unrope import Unrope, rope_tables

_TABLES: Final = 64
Real: TypeAlias = NDArray[np.float32]
Positions: TypeAlias = range | NDArray[np.int64]


def rope_turns(ropes: tuple[Rope, ...], at: Positions, *, undo: bool) -> tuple[Real, Real, bool]:
    """Return how keys at these positions turn.

    Args:
        ropes: The rotations of a piece, as `ropes_of` returns them.
        at: Positions of tokens.
        undo: Back, to where they were before they were rotated.

    Returns:
        Cosine and sine ``[rotations, tokens, pairs]``, and whether the two of a pair are neighbours.
    """
    return *_tables(ropes, at, undo=undo), bool(ropes) and ropes[0].interleaved


def ropes_of(bundle: Bundle, where: Where) -> tuple[Rope, ...]:
    """Return the different rotations of a piece's keys.

    Raises:
        StrategyError: They can't be applied together.
    """
    if where.kinds[0] != Kind.KEYS:
        return ()
    found = dict.fromkeys(bundle.rope_of(layer) for layer in where.layers)
    ropes = tuple(rope for rope in found if rope is not None)
    if len({(rope.interleaved, rope.rotary_dim) for rope in ropes}) > 1:
        raise StrategyError(
            Unrope.id, "layers of different rotary size or pairing need parts of their own"
        )
    return ropes


def rotation_of(row: int, where: Where, bundle: Bundle, ropes: tuple[Rope, ...]) -> int:
    """Return which rotation a row turns by, -1 for none."""
    if not ropes or where.kinds[0] != Kind.KEYS or row >= len(where.layers):
        return -1
    rope = bundle.rope_of(where.layers[row])
    return -1 if rope is None else ropes.index(rope)


def _tables(ropes: tuple[Rope, ...], at: Positions, *, undo: bool) -> tuple[Real, Real]:
    """Return cosine and sine ``[rotations, tokens, pairs]`` of positions."""
    if isinstance(at, range):
        return _range_tables(ropes, at.start, len(at), undo)
    first = int(at.min())
    cos, sin = _range_tables(ropes, first, int(at.max()) + 1 - first, undo)
    return cos[:, at - first], sin[:, at - first]


@lru_cache(maxsize=_TABLES)
def _range_tables(
    ropes: tuple[Rope, ...], first: int, tokens: int, undo: bool
) -> tuple[Real, Real]:
    if not ropes:
        return np.empty((0, tokens, 0), np.float32), np.empty((0, tokens, 0), np.float32)
    pairs = [rope_tables(rope, first, tokens, undo=undo) for rope in ropes]
    cos, sin = (np.stack(side) for side in zip(*pairs, strict=True))
    return cos, sin
