"""``transform.pca.v1``: principal components over heads and layers, of keys and values together."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_api.strategy import Kind
from kvserve_strategies.bundle import Basis, BasisKey, Bundle
from kvserve_strategies.linear import LinearStage, Real, bundle_of
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Form, Space, Spec, Where, take_form


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The cells that one basis joins.

    Attributes:
        group: Index of the group in its `Basis`.
        rows: Rows of the piece: key layers, then value layers.
        heads: Positions of its heads among the piece's.
    """

    group: int
    rows: tuple[int, ...]
    heads: tuple[int, ...]


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Pca(LinearStage):
    """Turn each block of layers and heads into its principal components, the largest first.

    Keys and values are linear images of one residual stream, so they are correlated, most of it across layers; the
    wider a block, the fewer bits its components take and the more multiplications they cost. The bases are fitted in
    the coordinates that the stages before this one lead to. Components of all blocks follow each other by layer and
    head block: ``[1, tokens, 1, components]``. The least components, which no supported step would notice, are not in
    the bundle and come back as zero.

    Attributes:
        layers: Layers a block; blocks start at multiples of it.
        heads: KV heads a block, 0 for all.
    """

    layers: int
    heads: int

    id: ClassVar[str] = "transform.pca.v1"
    summary: ClassVar[str] = "principal components over layers and heads"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``layers`` and ``heads``."""
        return cls(
            layers=params.integer("layers", minimum=1, maximum=65_535),
            heads=params.integer("heads", minimum=0, maximum=65_535),
        )

    def resolve(self, spec: Spec) -> Spec:
        """Take centred REAL values, with or without a metric, give REAL components."""
        take_form(self, spec, Form.REAL)
        if spec.space in (Space.NATIVE, Space.UNROPED, Space.COMPONENTS, Space.OTHER):
            raise StrategyError(
                self.id, f"takes centred values or those of a metric, not {spec.space} ones"
            )
        components = spec.layers * spec.kv_heads * spec.head_dim
        if spec.bundle is not None and spec.where is not None:
            bundle, where = bundle_of(self, spec)
            groups = self.basis(bundle, where, spec.space).groups
            components = sum(len(groups[b.group].sigma) for b in self.blocks(bundle, where))
        return replace(spec, layers=1, kv_heads=1, head_dim=components, space=Space.COMPONENTS)

    def key(self, kinds: tuple[Kind, ...], space: str) -> BasisKey:
        """Return the name of the basis that joins these kinds in this space."""
        joined = "".join(kind.value for kind in kinds)
        return BasisKey(space=str(space), kinds=joined, layers=self.layers, heads=self.heads)

    def basis(self, bundle: Bundle, where: Where, space: str) -> Basis:
        """Return the basis of a piece.

        Raises:
            StrategyError: The bundle has none of this width.
        """
        key = self.key(where.kinds, space)
        if key not in bundle.basis_keys:
            known = ", ".join(str(known) for known in bundle.basis_keys) or "none"
            raise StrategyError(self.id, f"the bundle has no basis {key}; it has: {known}")
        return bundle.basis(key)

    def blocks(self, bundle: Bundle, where: Where) -> tuple[Block, ...]:
        """Return the blocks of a piece, in the order of their components.

        Raises:
            StrategyError: The piece cuts through a block.
        """
        layout = bundle.layout
        width = self.heads or layout.kv_heads
        head_blocks = -(-layout.kv_heads // width)
        position = {layer: row for row, layer in enumerate(where.layers)}
        head_position = {head: column for column, head in enumerate(where.heads)}
        blocks = []
        for first in sorted({layer - layer % self.layers for layer in where.layers}):
            layers = range(first, min(first + self.layers, layout.layers))
            for head_block in sorted({head // width for head in where.heads}):
                heads = range(head_block * width, min((head_block + 1) * width, layout.kv_heads))
                if not (set(layers) <= set(position) and set(heads) <= set(head_position)):
                    raise StrategyError(
                        self.id,
                        f"joins layers {layers.start} to {layers.stop - 1} and heads {heads.start} to "
                        f"{heads.stop - 1}, but the piece has only some of them: cut pieces at multiples "
                        f"of {self.layers} layers",
                    )
                blocks.append(
                    Block(
                        group=first // self.layers * head_blocks + head_block,
                        rows=tuple(
                            position[layer] + half * len(where.layers)
                            for half in range(len(where.kinds))
                            for layer in layers
                        ),
                        heads=tuple(head_position[head] for head in heads),
                    )
                )
        return tuple(blocks)

    def apply(self, x: Real, spec: Spec) -> Real:
        """Project onto the components."""
        bundle, where = bundle_of(self, spec)
        basis = self.basis(bundle, where, spec.space)
        parts = []
        for block in self.blocks(bundle, where):
            rows = basis.groups[block.group].rows.astype(np.float64)
            wide = x[np.ix_(block.rows, range(spec.tokens), block.heads)]
            flat = wide.transpose(1, 0, 2, 3).reshape(spec.tokens, -1)
            # in float64, so that the order of summation, which differs between processors, does not show
            parts.append((flat.astype(np.float64) @ rows.T).astype(np.float32))
        return np.concatenate(parts, axis=1)[None, :, None, :]

    def invert(self, y: Real, spec: Spec) -> Real:
        """Return from the components."""
        bundle, where = bundle_of(self, spec)
        basis = self.basis(bundle, where, spec.space)
        out = np.empty(spec.shape, np.float32)
        at = 0
        for block in self.blocks(bundle, where):
            rows = basis.groups[block.group].rows.astype(np.float64)
            part = y[0, :, 0, at : at + len(rows)].astype(np.float64) @ rows
            at += len(rows)
            shape = (spec.tokens, len(block.rows), len(block.heads), spec.head_dim)
            out[np.ix_(block.rows, range(spec.tokens), block.heads)] = part.reshape(
                shape
            ).transpose(1, 0, 2, 3)
        return out
