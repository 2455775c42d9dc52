"""What strategies a model can have, for layouts with and without a bundle."""

import pytest

from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NAME_PATTERN
from kvserve_api.wire import KVLayout
from kvserve_profiler.space import MAX_NAME, Space
from kvserve_profiler.space_families import planned_bases, space_of
from kvserve_strategies import PRESETS, Pipeline, config_needs_bundle
from kvserve_strategies.bundle import BasisKey

LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")


@pytest.fixture(scope="module")
def space() -> Space:
    """The space of a model of SmolLM2's layout with the bundle of the default recipe."""
    return space_of(LAYOUT, planned_bases())


def test_thousands_that_can_work(space: Space) -> None:
    """There are more than 2,000 points, each of another strategy, and every one of them builds."""
    strategies = [space.strategy(point) for point in space.points()]
    assert len({strategy.digest for strategy in strategies}) == len(strategies) > 2000
    for strategy in strategies:
        assert Pipeline.of(strategy).config == strategy


def test_order_is_fixed(space: Space) -> None:
    """Two spaces of one model list the same points in the same order."""
    again = space_of(LAYOUT, dict(reversed(planned_bases().items())))
    assert list(again.points()) == list(space.points())


def test_all_presets(space: Space) -> None:
    """Every preset is a point, under its own name and with its own strategy."""
    presets = space.presets()
    assert list(presets) == list(PRESETS)
    for name, point in presets.items():
        assert space.strategy(point) == PRESETS[name]
        assert space.name_of(point) == name


def test_names_are_unique_labels(space: Space) -> None:
    """Names are DNS labels, and no two points share one."""
    names = [space.name_of(point) for point in space.points()]
    assert len(set(names)) == len(names)
    assert all(NAME_PATTERN.fullmatch(name) and len(name) <= MAX_NAME for name in names)
    assert "joint-3x0-step0p2-dead0p5-sinks1-recent32" in names


def test_features_tell_points_apart(space: Space) -> None:
    """No two points have the same features, and all features lie between 0 and 1 and are of use."""
    features = space.features(space.points())
    assert features.shape == (len(space.points()), len(space.feature_names))
    assert len({tuple(row) for row in features}) == len(features)
    assert features.min() == 0
    assert features.max() == 1
    assert (features.max(axis=0) > features.min(axis=0)).all()


def test_without_calibration() -> None:
    """Without a bundle nothing needs one, and the presets that do are no points."""
    space = space_of(LAYOUT)
    strategies = [space.strategy(point) for point in space.points()]
    assert len(strategies) > 1000
    assert not any(map(config_needs_bundle, strategies[::10]))
    assert list(space.presets()) == [n for n, s in PRESETS.items() if not config_needs_bundle(s)]


def test_widths_of_the_bundle() -> None:
    """Groups are as wide as the bundle's bases, and tokens are told apart only where that was learnt."""
    bases = {
        BasisKey("fisher", "kv", 5, 0): True,
        BasisKey("fisher", "kv", 1, 1): False,
        BasisKey("centred", "k", 2, 0): False,
    }
    space = space_of(LAYOUT, bases)
    widths = {
        family: {p["width"] for p in space.points() if p.family == family}
        for family in ("joint", "focus", "apart")
    }
    # keys without values make no pair
    assert widths == {"joint": {"1x1", "5x0"}, "focus": {"5x0"}, "apart": set()}
    calibrated = space.within(["joint", "focus"]).points()
    needed = {k for p in calibrated for k in Pipeline.of(space.strategy(p)).basis_keys}
    assert needed == {BasisKey("fisher", "kv", 5, 0), BasisKey("fisher", "kv", 1, 1)}


def test_small_model() -> None:
    """A model of two layers and one head has no splits, and no two widths that are the same for it."""
    space = space_of(KVLayout(layers=2, kv_heads=1, head_dim=32, dtype="float32"), planned_bases())
    points = space.points()
    assert {p["width"] for p in points if p.family == "joint"} == {"1x1", "3x0"}
    assert not [p for p in points if p.family == "split"]
    assert not [p for p in points if p.family == "lloyd" and p["edges"]]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        pytest.param({"levels": 12, "coder": "pack"}, "levels", id="bits-not-filled"),
        pytest.param({"keys": "token", "group": 64}, "group", id="group-is-a-head"),
    ],
)
def test_refused(space: Space, changed: dict[str, str | int], field: str) -> None:
    """Values that only waste bytes, or say the same as others, are refused by name."""
    values: dict[str, str | int] = {
        "keys": "channel", "levels": 16, "group": 0, "fewer": "no", "rotated": "no", "lead": 0,
        "coder": "rans",
    }  # fmt: skip
    assert space.point("minmax", **values)
    with pytest.raises(StrategyError) as caught:
        space.point("minmax", **(values | changed))
    assert caught.value.field == field
