"""The parameters of strategies, and the points that their values make.

A continuous parameter may have any value between the ends of its grid. Every value has one spelling, so that equal
points give equal strategies.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias

from kvserve_api.errors import StrategyError

Value: TypeAlias = str | int | float
FAMILY: Final = "family"
"""The key of a point under which its family's name stands."""
_DIGITS: Final = 6
"""Significant digits of a continuous value: enough to tell steps apart, few enough to have one spelling."""


class ParameterKind(StrEnum):
    """What a parameter's values mean to each other."""

    CATEGORICAL = "categorical"
    ORDINAL = "ordinal"
    CONTINUOUS = "continuous"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One choice of a family.

    Attributes:
        name: Families that mean the same by a parameter give it the same name; it is then one feature.
        kind: CATEGORICAL values are only different, ORDINAL ones are numbers in order, CONTINUOUS ones have more
            between them; the distance of two numbers is that of their logarithms, if all are positive.
        values: The grid, rising if they are numbers; at least one.
    """

    name: str
    kind: ParameterKind
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise StrategyError(self.name, f"must have different values, got {self.values}")
        numbers = [value for value in self.values if not isinstance(value, str)]
        if self.kind != ParameterKind.CATEGORICAL and (
            len(numbers) != len(self.values) or sorted(numbers) != numbers
        ):
            raise StrategyError(self.name, f"must have rising numbers, got {self.values}")

    def check(self, value: Value) -> Value:
        """Return a value in its one spelling.

        Raises:
            StrategyError: It is not one of the parameter's.
        """
        if self.kind != ParameterKind.CONTINUOUS:
            # 1, 1.0 and True are equal, and would give strategies with different digests
            for known in self.values:
                if value == known and not isinstance(value, bool):
                    return known
            listed = ", ".join(map(str, self.values))
            raise StrategyError(self.name, f"must be one of {listed}, got {value!r}")
        low, high = self._range
        if isinstance(value, str | bool) or not low <= value <= high:
            raise StrategyError(self.name, f"must be {low:g} to {high:g}, got {value!r}")
        return float(f"{value:.{_DIGITS}g}")

    def unit(self, value: Value) -> float:
        """Return where in the range of the parameter a number lies, 0 to 1."""
        assert not isinstance(value, str)
        low, high = self._range
        if low == high:
            return 0.0
        if low > 0:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    @property
    def _range(self) -> tuple[float, float]:
        low, high = self.values[0], self.values[-1]
        assert not isinstance(low, str)
        assert not isinstance(high, str)
        return float(low), float(high)


class Point(Mapping[str, Value]):
    """A point of a space: a family and its parameters' values, immutable and hashable."""

    __slots__ = ("_items", "family")

    def __init__(self, family: str, values: Mapping[str, Value]) -> None:
        """Keep a copy of the values.

        Args:
            family: The family's name.
            values: For each parameter of the family its value.
        """
        self.family: Final = family
        self._items: Final = MappingProxyType({FAMILY: family, **dict(sorted(values.items()))})

    def __getitem__(self, key: str) -> Value:
        """Return a parameter's value, or the family."""
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        """Yield ``family``, then the parameters by name."""
        return iter(self._items)

    def __len__(self) -> int:
        """Return the number of parameters and 1."""
        return len(self._items)

    def __hash__(self) -> int:
        """Hash by content."""
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        """Return what the point is made of."""
        return f"Point({dict(self._items)})"

    def __reduce__(self) -> tuple[type["Point"], tuple[str, dict[str, Value]]]:
        """Pickle as what it is made of: a mapping proxy can't be."""
        return Point, (self.family, {k: v for k, v in self._items.items() if k != FAMILY})

    def number(self, name: str) -> float:
        """Return a parameter that is a number."""
        return float(self._items[name])

    def count(self, name: str) -> int:
        """Return a parameter that is a whole number."""
        return int(self._items[name])
