"""Orthonormal bases for blocks of layers and heads, and the names they go by."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError
from kvserve_api.wire import KVLayout

CENTRED: Final = "centred"
"""The space of values less their mean, without a metric."""
KINDS: Final = ("k", "v", "kv")
_FORM: Final = re.compile(r"([a-z][a-z0-9_-]{0,31})\.(k|v|kv)\.([1-9]\d{0,4})x(0|[1-9]\d{0,4})")
_SPACE: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")


class Block(NamedTuple):
    """The part of a cache that one group of a basis spans.

    Attributes:
        layers: Which layers.
        heads: Which KV heads.
    """

    layers: range
    heads: range


@dataclass(frozen=True, order=True, slots=True)
class BasisKey:
    """Which basis of a bundle; as text like ``query.kv.10x0``.

    Attributes:
        space: ``centred``, or the name of the metric that values are multiplied by first.
        kinds: ``k``, ``v``, or ``kv`` for both jointly.
        layers: Layers that share a group; more than the model has are all of them, so that a strategy fits any model.
        heads: KV heads that share a group, likewise; 0 for all.
    """

    space: str
    kinds: str
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if not _FORM.fullmatch(str(self)):
            raise ArtifactError("basis", f"no key has the form {str(self)!r}")

    def __str__(self) -> str:
        return f"{self.space}.{self.kinds}.{self.layers}x{self.heads}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            ArtifactError: It is no key.
        """
        match = _FORM.fullmatch(text)
        if not match:
            raise ArtifactError("basis", f"a key looks like query.kv.10x0, got {text[:80]!r}")
        space, kinds, layers, heads = match.groups()
        return cls(space, kinds, int(layers), int(heads))

    def blocks(self, layout: KVLayout) -> tuple[Block, ...]:
        """Return the block of each group: layers outside, heads inside; the last of each may be smaller."""
        heads = self.heads or layout.kv_heads
        return tuple(
            Block(layer_range, head_range)
            for layer_range in _cut(layout.layers, self.layers)
            for head_range in _cut(layout.kv_heads, heads)
        )

    def count(self, layout: KVLayout) -> int:
        """Return the number of blocks, without making them."""
        return -(-layout.layers // self.layers) * -(
            -layout.kv_heads // (self.heads or layout.kv_heads)
        )

    def width(self, block: Block, layout: KVLayout) -> int:
        """Return the channels of a block: kinds, layers, heads, dimensions, the last fastest."""
        return len(self.kinds) * len(block.layers) * len(block.heads) * layout.head_dim


class Group(NamedTuple):
    """A basis of one block.

    Attributes:
        rows: ``[components, width]`` float16, orthonormal rows by falling deviation.
        sigma: ``[components]`` float32, their deviations in the basis's space.
    """

    rows: NDArray[np.float16]
    sigma: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """The groups of one key.

    Attributes:
        scale: Root mean square of all components of all groups: the unit of relative steps.
        groups: One for each of `BasisKey.blocks`, in that order.
        importance: For each group ``[features]`` float32, weights of what tells how much a token matters; empty if
            nothing was learnt of that. What the features are is said by the stage that uses them.
    """

    scale: float
    groups: tuple[Group, ...]
    importance: tuple[NDArray[np.float32], ...] = ()


def is_space(name: str) -> bool:
    """Tell whether a metric may have this name."""
    return bool(_SPACE.fullmatch(name)) and name != CENTRED


def _cut(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def named(basis: Basis) -> dict[str, NDArray[Any]]:
    """Return the tensors of a basis's file."""
    tensors: dict[str, NDArray[Any]] = {}
    for index, group in enumerate(basis.groups):
        tensors[f"rows.{index}"] = group.rows
        tensors[f"sigma.{index}"] = group.sigma
    for index, weights in enumerate(basis.importance):
        tensors[f"importance.{index}"] = weights
    return tensors
