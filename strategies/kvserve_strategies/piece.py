"""A piece of a cache that one chain codes: where it lies, and its cells in the arrays of the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvserve_api.strategy import Kind
from kvserve_kernels.linear import Cells
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.chain import Chain
from kvserve_strategies.split import Rectangle
from kvserve_strategies.stage import Array, Spec, Where


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in the cache of a request a piece lies.

    Attributes:
        first_layer: The piece's first layer.
        model_layers: Layers of the model; 0 if the piece ends with the last.
        first_token: Position of its first token in the request.
        tokens_after: Tokens of the request that follow it; a hint for encoders, decoders do not need it.
    """

    first_layer: int = 0
    model_layers: int = 0
    first_token: int = 0
    tokens_after: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of cells with the chain that codes it.

    Attributes:
        chain: The chain.
        cells: Which cells.
        specs: What each stage takes; the first of the kinds one after the other.
        bounds: The most bytes of each section.
        index: Its layers, tokens and heads in the arrays of the whole; slices where they are neighbours.
    """

    chain: Chain
    cells: Rectangle
    specs: tuple[Spec, ...]
    bounds: tuple[int, ...]
    index: tuple[Any, Any, Any]

    @property
    def is_apart(self) -> bool:
        """Keys and values are coded where they are, without a copy in one array."""
        layers, _, heads = self.index
        return self.chain.takes_halves and isinstance(layers, slice) and isinstance(heads, slice)

    @classmethod
    def of(
        cls, chain: Chain, cells: Rectangle, whole: Spec, at: Place, bundle: Bundle | None
    ) -> Self:
        """Return a piece.

        Args:
            chain: The chain.
            cells: Which cells of the model's cache.
            whole: What is coded in all.
            at: Where that lies.
            bundle: The model's calibration, if there is one.
        """
        layers = [layer - at.first_layer for layer in cells.layers]
        tokens = slice(cells.tokens.start - at.first_token, cells.tokens.stop - at.first_token)
        spec = replace(
            whole,
            layers=len(cells.kinds) * len(layers),
            tokens=len(cells.tokens),
            kv_heads=len(cells.heads),
            where=Where(
                kinds=cells.kinds,
                layers=cells.layers,
                heads=cells.heads,
                first_token=cells.tokens.start,
                tokens_after=at.first_token + whole.tokens - cells.tokens.stop + at.tokens_after,
            ),
            bundle=bundle if chain.calibrated else None,
        )
        specs = tuple(chain.specs(spec))
        index = (_neighbours(layers), tokens, _neighbours(cells.heads))
        return cls(chain, cells, specs, tuple(chain.section_bounds(specs)), index)

    def take(self, halves: Mapping[Kind, Array]) -> Cells:
        """Return the cells as the chain takes them, keys before values."""
        if self.is_apart:
            return self.views(halves)
        parts = [self._view(halves[kind]) for kind in self.cells.kinds]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)

    def views(self, halves: Mapping[Kind, Array]) -> Cells:
        """Return the cells where they are, if they are apart."""
        first, *more = (self._view(halves[kind]) for kind in self.cells.kinds)
        return (first, more[0]) if more else first

    def put(self, target: Array, part: Array) -> None:
        """Write the cells of one kind."""
        layers, tokens, heads = self.index
        if isinstance(layers, slice) or isinstance(heads, slice):
            target[layers, tokens, heads] = part
        else:
            target[np.ix_(layers, range(tokens.start, tokens.stop), heads)] = part

    def _view(self, half: Array) -> Array:
        layers, tokens, heads = self.index
        # two lists of indices would be taken pair by pair
        view: Array = half[layers][:, tokens][:, :, heads]
        return view


def _neighbours(indices: Sequence[int]) -> Any:
    """Return a slice if indices follow each other, which makes a view, else a list."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else list(indices)
