"""The strategy space: what may be profiled, as points that a search can enumerate, compare and measure.

A point names a *family*, one shape of strategy, and a value for each parameter of that family; the parameters of other
families do not exist for it. Every family has a grid, so that the space can be listed; between the values of its grid a
continuous parameter may have any value of its range. Features are what surrogate models see: numbers from 0 to 1.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NAME_PATTERN
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.space_point import FAMILY, Parameter, ParameterKind, Point, Value
from kvserve_strategies.presets import PRESETS

MAX_NAME: Final = 63
_PRESET_NAMES: Final = {strategy.digest: name for name, strategy in PRESETS.items()}


@dataclass(frozen=True, slots=True)
class Family:
    """One shape of strategy.

    Attributes:
        name: Lower-case letters.
        parameters: Its choices.
        build: Returns the strategy of a point; raises StrategyError for values that don't go together.
        extra: Points beside the grid, each with a value for every parameter.
    """

    name: str
    parameters: tuple[Parameter, ...]
    build: Callable[[Point], StrategyConfig]
    extra: tuple[Mapping[str, Value], ...] = ()

    def __hash__(self) -> int:
        """Hash by what tells families of one space apart."""
        return hash((self.name, self.parameters))

    def point(self, values: Mapping[str, Any]) -> Point:
        """Return a point of the family.

        Raises:
            StrategyError: A value is missing, unknown or out of range.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in sorted(known.keys() ^ values.keys()):
            state = "missing" if name in known else f"no parameter of {self.name}"
            raise StrategyError(f"{self.name}.{name}", f"is {state}")
        return Point(self.name, {name: known[name].check(values[name]) for name in known})

    def grid(self) -> Iterator[Point]:
        """Yield all combinations of the grid's values, the last parameter fastest, and those beside it."""
        names = [parameter.name for parameter in self.parameters]
        for values in itertools.product(*(parameter.values for parameter in self.parameters)):
            yield self.point(dict(zip(names, values, strict=True)))
        for values_of in self.extra:
            yield self.point(values_of)

    def words(self, point: Point) -> Iterator[str]:
        """Yield the words of a point's name: what is zero or off goes without saying."""
        yield self.name
        for parameter in self.parameters:
            value = point[parameter.name]
            if isinstance(value, str):
                if value != "no":
                    yield value if value != "yes" else parameter.name
            elif value:
                yield f"{parameter.name}{value:g}".replace(".", "p")


@dataclass(frozen=True)
class Space:
    """A mixed space of strategies.

    Attributes:
        families: With unique names.
    """

    families: tuple[Family, ...]

    def __post_init__(self) -> None:
        names = [family.name for family in self.families]
        if len(set(names)) != len(names):
            raise StrategyError("families", f"must have unique names, got {', '.join(names)}")

    def within(self, names: Collection[str]) -> Self:
        """Return the part of the space that some families are.

        Raises:
            StrategyError: There is no such family.
        """
        if unknown := sorted(set(names) - self._by_name.keys()):
            known = ", ".join(self._by_name)
            raise StrategyError("families", f"{unknown[0]!r} is not known; known: {known}")
        return type(self)(tuple(family for family in self.families if family.name in names))

    def point(self, family: str, **values: Value) -> Point:
        """Return a point, which need not be on the grid.

        Raises:
            StrategyError: It is not in the space, or its values do not go together.
        """
        point = self._family(family).point(values)
        self.strategy(point)
        return point

    def strategy(self, point: Point) -> StrategyConfig:
        """Return the strategy of a point.

        Raises:
            StrategyError: It is not in the space, or its values do not go together; the error says why.
        """
        family = self._family(point.family)
        values = {name: value for name, value in point.items() if name != FAMILY}
        return family.build(family.point(values))

    def points(self) -> Sequence[Point]:
        """Return the grid: all points that can work, no two with one strategy, always in the same order."""
        return self._points

    def presets(self) -> Mapping[str, Point]:
        """Return the presets that are in the space, by name."""
        digests = ((name, strategy.digest) for name, strategy in PRESETS.items())
        return {name: self._listed[digest] for name, digest in digests if digest in self._listed}

    def name_of(self, point: Point) -> str:
        """Return a name for a point, a DNS label: its preset's, or one that tells its parameters.

        Points of different strategies have different names, in every space that has the same families.

        Raises:
            StrategyError: The point is not in the space.
        """
        strategy = self.strategy(point)
        if preset := _PRESET_NAMES.get(strategy.digest):
            return preset
        name = "-".join(self._family(point.family).words(point))
        if len(name) > MAX_NAME or not NAME_PATTERN.fullmatch(name):
            raise StrategyError(point.family, f"has no name of {MAX_NAME} characters: {name!r}")
        return name

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each feature is: ``parameter`` for a number, ``parameter=value`` for one of several choices."""
        return tuple(self._columns)

    def features(self, points: Iterable[Point]) -> NDArray[np.float64]:
        """Return what a surrogate model sees of points.

        Args:
            points: Of this space.

        Returns:
            ``[points, features]`` float64, 0 to 1, in the order of `feature_names`. Choices are one-hot, numbers scaled
            over the range of their family; what a point's family has not is 0.
        """
        chosen = list(points)
        out = np.zeros((len(chosen), len(self._columns)), np.float64)
        for row, point in enumerate(chosen):
            out[row, self._columns[f"{FAMILY}={point.family}"]] = 1.0
            for parameter in self._family(point.family).parameters:
                value = point[parameter.name]
                if parameter.kind == ParameterKind.CATEGORICAL:
                    out[row, self._columns[f"{parameter.name}={value}"]] = 1.0
                else:
                    out[row, self._columns[parameter.name]] = parameter.unit(value)
        return out

    def _family(self, name: str) -> Family:
        if name not in self._by_name:
            raise StrategyError(FAMILY, f"{name!r} is not known; known: {', '.join(self._by_name)}")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Family]:
        return {family.name: family for family in self.families}

    @cached_property
    def _columns(self) -> Mapping[str, int]:
        names = [f"{FAMILY}={family.name}" for family in self.families]
        for parameter in (p for family in self.families for p in family.parameters):
            if parameter.kind == ParameterKind.CATEGORICAL:
                names += [f"{parameter.name}={value}" for value in parameter.values]
            else:
                names.append(parameter.name)
        return {name: index for index, name in enumerate(dict.fromkeys(names))}

    @cached_property
    def _listed(self) -> Mapping[str, Point]:
        """The grid by digest of the strategy."""
        found: dict[str, Point] = {}
        for family in self.families:
            for point in family.grid():
                try:
                    found.setdefault(family.build(point).digest, point)
                except StrategyError:
                    # values that do not go together: the grid is wider than the space
                    continue
        return found

    @cached_property
    def _points(self) -> tuple[Point, ...]:
        return tuple(self._listed.values())
