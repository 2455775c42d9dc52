"""What the linear transform of a piece of a cache is made of.

The channels of a piece ``[rows, tokens, heads, dim]`` form groups. One token of a group is a vector of W values: the
``dim`` values of each of its slots, a slot being one row and one head. Encoding maps the vector to C integer levels by
an int8 matrix, decoding maps levels back by a bfloat16 matrix that has the quantiser's step in it.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow

MAX_SHIFT = 31
MAX_LEVEL = 32_767
Cells: TypeAlias = NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]
"""The values of a piece: one array, or its rows of keys and its rows of values apart, alike in all but content."""
# 127 * 127 * 131,072 < 2**31: sums of products fit int32
MAX_WIDTH = 131_072
# below it, what a processor that flushes subnormal numbers loses is far from half a unit
_LARGEST_INV_SCALE = 2.0**100
# so that 131,072 products with levels stay finite
_LARGEST_INVERSE = 2.0**80


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The transform of one group of S slots, W = S · dim values and C components.

    Attributes:
        rows: ``[S]`` int32: first index of each slot into the piece.
        heads: ``[S]`` int32: its third index.
        rotations: ``[S]`` int32: which rotation table the slot turns by; -1 for values, and keys that do not turn.
        mean: ``[W]`` float32, of keys turned back.
        inv_scale: ``[W]`` float32, positive: 127 over the magnitude that fills int8.
        matrix: ``[C, W]`` int8: component c is ``matrix[c] · x8``.
        factor: ``[C]`` float32, not negative: levels per unit of that product.
        offset: ``[C]`` float32 in [0, 1): what is added before magnitudes are cut to integers, 0.5 less the dead zone.
        delta: ``[C]`` float32 in [-1, 0]: what is added to the magnitude of a level that is not 0 when it is decoded.
        inverse: ``[C, W]`` float32, rounded to bfloat16 before use: the values of one level of each component.
        unit: Positive: what levels are multiplied by before that.
        base: The group whose first components these are; their packed forms are the base's. None for itself.
    """

    rows: NDArray[np.int32]
    heads: NDArray[np.int32]
    rotations: NDArray[np.int32]
    mean: NDArray[np.float32]
    inv_scale: NDArray[np.float32]
    matrix: NDArray[np.int8]
    factor: NDArray[np.float32]
    offset: NDArray[np.float32]
    delta: NDArray[np.float32]
    inverse: NDArray[np.float32]
    unit: float = 1.0
    base: "Group | None" = None

    def __post_init__(self) -> None:
        slots, width, components = self.rows.size, self.mean.size, self.factor.size
        if not 2.0**-40 <= self.unit <= 2.0**40:
            raise ValueError(f"unit must lie in [2^-40, 2^40], got {self.unit}")
        if slots < 1 or width % slots or not 0 < width <= MAX_WIDTH:
            raise ValueError(f"{width} values do not fill {slots} slots")
        for name, shape, dtype in (
            ("rows", (slots,), np.int32),
            ("heads", (slots,), np.int32),
            ("rotations", (slots,), np.int32),
            ("mean", (width,), np.float32),
            ("inv_scale", (width,), np.float32),
            ("matrix", (components, width), np.int8),
            ("factor", (components,), np.float32),
            ("offset", (components,), np.float32),
            ("delta", (components,), np.float32),
            ("inverse", (components, width), np.float32),
        ):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {shape}, contiguous")
        for name, least, most in (
            ("rows", 0, 2**31 - 1),
            ("heads", 0, 2**31 - 1),
            ("rotations", -1, 2**31 - 1),
            ("mean", -_LARGEST_INVERSE, _LARGEST_INVERSE),
            ("matrix", -127, 127),
            ("factor", 0, _LARGEST_INV_SCALE),
            ("offset", 0, 1 - 2.0**-24),
            ("delta", -1, 0),
            ("inverse", -_LARGEST_INVERSE, _LARGEST_INVERSE),
            ("inv_scale", 2.0**-120, _LARGEST_INV_SCALE),
        ):
            if self.base is not None and name in ("matrix", "inverse"):
                # the base has been looked at, and they are large
                continue
            array = getattr(self, name)
            # written so that NaN fails too
            if array.size and not (array.min() >= least and array.max() <= most):
                raise ValueError(f"{name} must lie in [{least}, {most}]")

    @property
    def width(self) -> int:
        """W."""
        return self.mean.size

    @property
    def components(self) -> int:
        """C."""
        return self.factor.size

    def first(
        self,
        components: int,
        *,
        factor: NDArray[np.float32],
        offset: NDArray[np.float32],
        delta: NDArray[np.float32],
        unit: float,
    ) -> "Group":
        """Return the group of the first components with another quantiser; the matrices are shared.

        Args:
            components: How many.
            factor: ``[components]``, like the others.
            offset: The same.
            delta: The same.
            unit: See `Group`.
        """
        base = self.base or self
        return Group(
            rows=self.rows,
            heads=self.heads,
            rotations=self.rotations,
            mean=self.mean,
            inv_scale=self.inv_scale,
            matrix=base.matrix[:components],
            factor=factor,
            offset=offset,
            delta=delta,
            inverse=base.inverse[:components],
            unit=unit,
            base=base,
        )

    def moved(self, mean: NDArray[np.float32]) -> "Group":
        """Return the group with other means ``[W]``; the matrices are shared."""
        return replace(self, mean=mean, base=self.base or self)

    @cached_property
    def inverse_bits(self) -> NDArray[np.uint16]:
        """``inverse`` as the bits of bfloat16."""
        if self.base is not None:
            return self.base.inverse_bits[: self.components]
        return narrow(self.inverse, np.uint16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The transform of a piece: its groups, whose levels follow each other; keep it, for its packed forms are kept.

    Attributes:
        groups: At least one.
        dim: Values of a slot.
    """

    groups: tuple[Group, ...]
    dim: int

    def __post_init__(self) -> None:
        if not self.groups or any(g.width != g.rows.size * self.dim for g in self.groups):
            raise ValueError(f"a group's slots must hold {self.dim} values each")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """``[groups + 1]``: where the components of each group start among those of the plan."""
        return _cumulated([g.components for g in self.groups])

    @property
    def components(self) -> int:
        """Components of all groups."""
        return int(self.starts[-1])

    @cached_property
    def least_shape(self) -> tuple[int, int, int]:
        """The rows, heads and rotation tables that a piece must have at least."""
        names = ("rows", "heads", "rotations")
        rows, heads, rotations = (max(getattr(g, n).max() for g in self.groups) for n in names)
        return int(rows) + 1, int(heads) + 1, int(rotations) + 1


def halves_of(cells: Cells) -> tuple[NDArray[Any], ...]:
    """Return the arrays that hold cells.

    Raises:
        ValueError: They are not of one shape, dtype and memory layout.
    """
    if not isinstance(cells, tuple):
        return (cells,)
    first, second = cells
    # where there is one index only, its stride means nothing
    steps = zip(first.shape, first.strides, second.strides, strict=True)
    if (first.shape, first.dtype) != (second.shape, second.dtype) or any(
        a != b for size, a, b in steps if size > 1
    ):
        raise ValueError("keys and values must be alike")
    return cells


def _cumulated(sizes: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def group_arrays(group: Group) -> tuple[NDArray[Any], ...]:
    """Return the arrays of a group in the order of its attributes."""
    return tuple(getattr(group, field.name) for field in fields(group))
