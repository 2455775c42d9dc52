"""The non-dominated set."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import Profile
from kvserve_profiler.pareto import dominates, front, non_dominated, objectives
from kvserve_strategies.presets import PRESETS


def make(
    name: str, *, ratio: float, loss: float, speed: float, upper: float | None = None
) -> Profile:
    """Return a profile; the strategy does not matter here."""
    return Profile(
        name=name,
        strategy=PRESETS["none"],
        ratio=ratio,
        loss_bp=loss,
        loss_upper_bp=loss if upper is None else upper,
        encode=StageCost(bytes_per_s=speed),
        decode=StageCost(bytes_per_s=speed),
        lossless=loss == 0,
    )


def test_what_is_beaten_in_everything_is_left_out() -> None:
    """Only profiles that are best at something stay, by falling ratio."""
    profiles = [
        make("none", ratio=1.0, loss=0, speed=1e10),
        make("slow", ratio=2.0, loss=5, speed=1e8),
        make("good", ratio=2.1, loss=4, speed=1e9),
        make("tight", ratio=6.0, loss=300, speed=1e8),
    ]
    assert [p.name for p in front(profiles, 1_000_000)] == ["tight", "good", "none"]


def test_none_stays_even_when_beaten() -> None:
    """The raw profile is in every set."""
    profiles = [
        make("none", ratio=1.0, loss=0, speed=1e8),
        make("lossless", ratio=1.5, loss=0, speed=1e9),
    ]
    assert {p.name for p in front(profiles, 1_000_000)} == {"none", "lossless"}


def test_the_upper_limit_counts() -> None:
    """A profile with the better estimate but the worse limit does not push out the other."""
    one = make("one", ratio=2.0, loss=10, upper=50, speed=1e9)
    other = make("other", ratio=2.0, loss=11, upper=20, speed=1e9)
    none = make("none", ratio=1.0, loss=0, speed=1e10)
    assert {p.name for p in front([none, one, other], 1_000_000)} == {"none", "other"}


def test_codec_time_counts_at_the_given_size() -> None:
    """The same profiles rank by offset for small transfers and by speed for large ones."""
    none = make("none", ratio=1.0, loss=0, speed=1e10)
    assert objectives(none, 10_000_000)[2] == pytest.approx(0.002)


def test_nan_is_dropped_before_comparing() -> None:
    """A point with NaN neither stays nor protects others from being compared."""
    points = {
        "nan": (math.nan, 0.0, 0.0),
        "infinite": (-9.0, math.inf, 0.0),
        "best": (-2.0, 1.0, 1.0),
        "worse": (-2.0, 2.0, 1.0),
    }
    assert non_dominated(points) == {"best"}


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=20))
def test_the_set_is_what_its_definition_says(values: list[tuple[int, int, int]]) -> None:
    """Each kept point is beaten by none, each dropped one by a kept one."""
    points = {str(index): value for index, value in enumerate(values)}
    kept = non_dominated(points)
    assert kept
    for name, point in points.items():
        beaten = any(dominates(points[k], point) for k in kept)
        assert beaten != (name in kept)
