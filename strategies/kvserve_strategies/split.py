"""Which part of a strategy codes which cells of a piece of the cache, as rectangles.

Of the parts the first that selects a cell takes it; a joint part takes only cells whose key and value are both free.
What a part gets may have any outline; it is cut into rectangles (a range of tokens, layers that share one set of
heads), and each is coded on its own. Both ends come to the same cut from the header of the blob alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvserve_api.strategy import Kind, Part, select_indices, select_tokens

_FREE = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """The cells of a piece of the cache.

    Attributes:
        layers: Layers of the model in the piece.
        model_layers: Layers of the whole model.
        heads: KV heads of the piece; those of one tensor-parallel rank.
        tokens: Positions in the request.
    """

    layers: range
    model_layers: int
    heads: int
    tokens: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectangle:
    """Cells that one part codes as one.

    Attributes:
        part: Index of the part.
        kinds: Keys, values or both.
        layers: Layers of the model, rising.
        heads: KV heads, rising.
        tokens: Positions in the request.
    """

    part: int
    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: range


def cut(parts: Sequence[Part], extent: Extent) -> tuple[Rectangle, ...]:
    """Return the rectangles of a piece, by part, position, layer; every cell is in exactly one.

    Args:
        parts: Of a `kvserve_api.strategy.StrategyConfig`, which ensures that they cover everything.
        extent: The piece.
    """
    return _cut(tuple((p.kinds, p.layers, p.heads, p.tokens) for p in parts), extent)


@lru_cache(maxsize=1024)
def _cut(
    selectors: tuple[tuple[tuple[Kind, ...], str, str, str], ...], extent: Extent
) -> tuple[Rectangle, ...]:
    spans = [select_tokens(tokens, extent.tokens) for _, _, _, tokens in selectors]
    bounds = sorted({b for s in (*spans, extent.tokens) if len(s) for b in (s.start, s.stop)})
    intervals = [range(start, stop) for start, stop in pairwise(bounds)]
    grids = [_grid(layers, heads, extent) for _, layers, heads, _ in selectors]
    owned = [_owners(selectors, spans, grids, interval) for interval in intervals]
    rectangles: list[Rectangle] = []
    for number, (kinds, *_) in enumerate(selectors):
        masks = [owners[kinds[0]] == number for owners in owned]
        for tokens, mask in _merge(intervals, masks):
            rectangles += [
                Rectangle(part=number, kinds=kinds, layers=layers, heads=heads, tokens=tokens)
                for layers, heads in _rows(mask, extent)
            ]
    return tuple(rectangles)


def _grid(layers: str, heads: str, extent: Extent) -> NDArray[np.bool_]:
    """Return which layers and heads of the piece two selectors select, ``[layers, heads]``."""
    chosen_layers = select_indices(layers, extent.model_layers)
    chosen_heads = select_indices(heads, extent.heads)
    rows = np.array([layer in chosen_layers for layer in extent.layers])
    columns = np.array([head in chosen_heads for head in range(extent.heads)])
    grid: NDArray[np.bool_] = np.logical_and.outer(rows, columns)
    return grid


def _owners(
    selectors: Sequence[tuple[tuple[Kind, ...], str, str, str]],
    spans: Sequence[range],
    grids: Sequence[NDArray[np.bool_]],
    interval: range,
) -> dict[Kind, NDArray[np.int16]]:
    """Return for keys and values which part takes each ``[layer, head]`` of an interval of tokens."""
    owners = {kind: np.full(grids[0].shape, _FREE, np.int16) for kind in Kind}
    for number, ((kinds, *_), span, grid) in enumerate(zip(selectors, spans, grids, strict=True)):
        if not (span.start <= interval.start and interval.stop <= span.stop):
            continue
        free = np.logical_and.reduce([owners[kind] == _FREE for kind in kinds]) & grid
        for kind in kinds:
            owners[kind][free] = number
    return owners


def _merge(
    intervals: Sequence[range], masks: Sequence[NDArray[np.bool_]]
) -> list[tuple[range, NDArray[np.bool_]]]:
    """Join neighbouring intervals in which a part takes the same cells; leave out those where it takes none."""
    merged: list[tuple[range, NDArray[np.bool_]]] = []
    for interval, mask in zip(intervals, masks, strict=True):
        if not mask.any():
            continue
        if merged and merged[-1][0].stop == interval.start and (merged[-1][1] == mask).all():
            merged[-1] = (range(merged[-1][0].start, interval.stop), mask)
        else:
            merged.append((interval, mask))
    return merged


def _rows(mask: NDArray[np.bool_], extent: Extent) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return layers with their common heads, by the first layer of each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, row in zip(extent.layers, mask, strict=True):
        heads = tuple(np.flatnonzero(row).tolist())
        if heads:
            groups.setdefault(heads, []).append(layer)
    return [(tuple(layers), heads) for heads, layers in groups.items()]
