"""Bootstrap intervals of ratios, and verdicts by them."""

import math
import random

import pytest

from pd_pairs import Estimate, Target, estimate, mean_ratio, median_ratio, resampled


def test_ratios_are_of_pairs() -> None:
    """The median is of the pairs' ratios, the mean's ratio weighs pairs by their length."""
    pairs = [(1.0, 1.0), (2.0, 1.0), (30.0, 10.0)]
    assert median_ratio(pairs) == 2.0
    assert mean_ratio(pairs) == 33 / 12


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of many samples of normal numbers about nine in ten give an interval with the mean."""
    dice = random.Random(3)

    def mean(items: object) -> float:
        assert isinstance(items, list)
        return sum(items) / len(items)

    covered = 0
    for _ in range(60):
        found = estimate([[dice.gauss(5.0, 1.0) for _ in range(40)]], mean, least_rounds=1)
        covered += found.low <= 5.0 <= found.high
    assert 48 <= covered <= 59


def test_what_rounds_share_widens_the_interval() -> None:
    """Items that are alike within their round tell less than as many that are not."""
    apart = [[float(i)] * 4 for i in range(6)]
    mixed = [[float((i + j) % 6) for j in range(4)] for i in range(6)]
    wide, narrow = (
        estimate(rounds, lambda items: sum(items) / len(items)) for rounds in (apart, mixed)
    )
    assert wide.value == narrow.value == 2.5
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_resamples_are_of_whole_rounds() -> None:
    """What is drawn comes from as many rounds as there are, each with all of its items' number."""
    drawn = resampled([["a", "a"], ["b", "b"]], random.Random(1))
    assert len(drawn) == 4
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]


def test_few_items_have_no_interval() -> None:
    """Four can lie on one side by chance, and nothing has no value."""
    few = estimate([[1.0, 2.0], [], [3.0, 4.0]], max)
    assert (few.value, few.items) == (4.0, 4)
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert math.isnan(estimate([], max).value)


def test_few_rounds_have_no_interval() -> None:
    """Two do not show what changes from one to the next, unless nobody asks."""
    rounds = [[1.0] * 9, [2.0] * 9]
    assert math.isnan(estimate(rounds, max).low)
    assert estimate([*rounds, [3.0] * 9], max).high == 3.0
    assert estimate(rounds, max, least_rounds=1).high == 2.0


def test_infinite_draws_have_an_interval() -> None:
    """Where resamples are infinite the interval ends there."""
    found = estimate([[1.0, math.inf]] * 3, max)
    assert (found.value, found.high) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("sign", "low", "high", "verdict"),
    [
        pytest.param(">=", 2.1, 3.0, "holds", id="more"),
        pytest.param(">=", 1.0, 1.9, "missed", id="less"),
        pytest.param(">=", 1.0, 3.0, "unclear", id="both"),
        pytest.param("<=", 1.0, 1.9, "holds", id="less-is-wanted"),
        pytest.param("<=", 2.1, 3.0, "missed", id="more-is-not"),
        pytest.param("<=", math.nan, math.nan, "unclear", id="not-known"),
        pytest.param(">", 2.1, math.inf, "holds", id="infinite"),
    ],
)
def test_a_target_is_met_if_the_whole_interval_does(
    sign: str, low: float, high: float, verdict: str
) -> None:
    """An interval with the bound in it shows neither."""
    found = Estimate(value=2.0, low=low, high=high, items=9)
    assert Target(sign, 2.0).verdict(found) == verdict
