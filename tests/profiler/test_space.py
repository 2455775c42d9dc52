"""The space itself, on a small one; what families there are is in test_space_families."""

import pickle

import numpy as np
import pytest

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.space import Family, Space
from kvserve_profiler.space_point import Parameter, ParameterKind, Point
from kvserve_strategies.presets import PRESETS, preset

STEP = Parameter("step", ParameterKind.CONTINUOUS, (0.1, 0.2, 0.4))
LEVELS = Parameter("levels", ParameterKind.ORDINAL, (0, 4, 8))
AXIS = Parameter("axis", ParameterKind.CATEGORICAL, ("no", "yes"))
SPACE = Space(
    (
        Family("raw", (), lambda _: preset("none")),
        Family("fine", (STEP, AXIS), lambda point: _by_hash(point)),
        Family("coarse", (LEVELS, AXIS), lambda point: _by_hash(point)),
    )
)


def _by_hash(point: Point) -> StrategyConfig:
    if point.get("levels") == 8 and point["axis"] == "yes":
        raise StrategyError("levels", "8 are too many for this axis")
    names = [name for name in PRESETS if name != "none"]
    # two points of the grid share a strategy
    if point.get("step") == 0.4:
        return preset(names[0])
    return preset(names[1 + (list(SPACE.families[1].grid()) + list(_coarse())).index(point)])


def _coarse() -> list[Point]:
    return list(SPACE.families[2].grid())


def test_grid() -> None:
    """The list holds each strategy once, leaves out what cannot work, and has the order of the grid."""
    points = SPACE.points()
    assert [point.family for point in points] == ["raw"] + 5 * ["fine"] + 5 * ["coarse"]
    assert points[1] == Point("fine", {"step": 0.1, "axis": "no"})
    assert points[2]["axis"] == "yes"
    assert len({SPACE.strategy(point).digest for point in points}) == len(points)


def test_point_is_hashable_and_pickles() -> None:
    """A point is equal to, and found under, its copy, whatever the order its values were given in."""
    one = Point("fine", {"step": 0.1, "axis": "no"})
    other = Point("fine", {"axis": "no", "step": 0.1})
    assert {one: "found"}[other] == "found"
    assert pickle.loads(pickle.dumps(one)) == one
    assert dict(one) == {"family": "fine", "axis": "no", "step": 0.1}


@pytest.mark.parametrize(
    ("family", "values", "field"),
    [
        pytest.param("none", {}, "family", id="family"),
        pytest.param("fine", {"step": 0.1}, "fine.axis", id="missing"),
        pytest.param("fine", {"step": 0.1, "axis": "no", "bits": 2}, "fine.bits", id="unknown"),
        pytest.param("fine", {"step": 0.5, "axis": "no"}, "step", id="above"),
        pytest.param("fine", {"step": float("nan"), "axis": "no"}, "step", id="nan"),
        pytest.param("fine", {"step": "0.1", "axis": "no"}, "step", id="text"),
        pytest.param("coarse", {"levels": 5, "axis": "no"}, "levels", id="between-ordinals"),
        pytest.param("coarse", {"levels": 8, "axis": "yes"}, "levels", id="together"),
        pytest.param("coarse", {"levels": False, "axis": "no"}, "levels", id="boolean"),
    ],
)
def test_refused(family: str, values: dict[str, str | float], field: str) -> None:
    """What is not in the space is refused by the name of the parameter."""
    with pytest.raises(StrategyError) as caught:
        SPACE.point(family, **values)
    assert caught.value.field == field


def test_between_grid_values() -> None:
    """A continuous parameter takes what lies between, in one spelling of six digits."""
    family = SPACE.families[1]
    assert family.point({"step": 0.123456789, "axis": "no"})["step"] == 0.123457


def test_features() -> None:
    """Numbers are scaled by their logarithm where they have one, choices are one-hot, what is not there is 0."""
    names = ("family=raw", "family=fine", "family=coarse", "step", "axis=no", "axis=yes", "levels")
    assert SPACE.feature_names == names
    points = [
        Point("raw", {}),
        Point("fine", {"step": 0.2, "axis": "yes"}),
        Point("coarse", {"levels": 4, "axis": "no"}),
    ]
    expected: list[list[float]] = [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0.5, 0, 1, 0],
        [0, 0, 1, 0, 1, 0, 0.5],
    ]
    np.testing.assert_allclose(SPACE.features(points), np.array(expected), atol=1e-12)


def test_names() -> None:
    """A preset keeps its name; of the words of others zeros and what is off are left out."""
    assert SPACE.name_of(SPACE.points()[0]) == "none"
    fine = SPACE.families[1]
    assert list(fine.words(Point("fine", {"step": 0.1, "axis": "yes"}))) == [
        "fine",
        "step0p1",
        "axis",
    ]
    assert list(_words("coarse", levels=0, axis="no")) == ["coarse"]


def _words(family: str, **values: str | int) -> list[str]:
    chosen = next(f for f in SPACE.families if f.name == family)
    return list(chosen.words(Point(family, values)))


def test_within() -> None:
    """A narrowed space has only the named families' points; a name that is not known is refused."""
    assert {point.family for point in SPACE.within(["raw", "fine"]).points()} == {"raw", "fine"}
    with pytest.raises(StrategyError, match="'gone' is not known; known: raw, fine, coarse"):
        SPACE.within(["raw", "gone"])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        pytest.param(ParameterKind.ORDINAL, (2, 1), id="falling"),
        pytest.param(ParameterKind.CONTINUOUS, ("a",), id="no-number"),
        pytest.param(ParameterKind.CATEGORICAL, ("a", "a"), id="twice"),
        pytest.param(ParameterKind.CATEGORICAL, (), id="none"),
    ],
)
def test_parameter_refuses(kind: ParameterKind, values: tuple[str | int, ...]) -> None:
    """A parameter's values must be different, and rise if they are numbers."""
    with pytest.raises(StrategyError, match=r"must have (rising|different)"):
        Parameter("width", kind, values)


def test_long_name_is_refused() -> None:
    """A name that would be no DNS label is refused rather than cut."""
    mixed = StrategyConfig(parts=(preset("fp8").parts[0], preset("int8-token").parts[1]))
    space = Space((Family("x" * 70, (), lambda _: mixed),))
    with pytest.raises(StrategyError, match="63 characters"):
        space.name_of(space.points()[0])
