"""How far margins are loosened where fewer transfers are late than was predicted."""

import random

import pytest

from kvserve_api.policy import Metric, Objective
from kvserve_controller.leeway import AIM, Leeway


def objective(percentile: int = 95) -> Objective:
    """Return an objective."""
    return Objective(
        name="it", metric=Metric.KV_TRANSFER_TIME, percentile=percentile, threshold_ms=1000
    )


@pytest.mark.parametrize("percentile", [1, 50, 95, 99, 100])
def test_it_stays_within_half_of_the_percentile(percentile: int) -> None:
    """Whatever comes, margins are made for some percentile above 0 that is no higher than was asked for."""
    leeway = Leeway()
    for late in (False, True):
        for _ in range(5000):
            leeway.add(objective(percentile), late=late)
            assert 0 <= leeway.share <= percentile / 200
    assert leeway.share == 0


def test_what_is_late_takes_back_what_many_in_time_have_given() -> None:
    """At 95 %, as many in time as make up for one late one leave the leeway where it was."""
    leeway = Leeway()
    for _ in range(200):
        leeway.add(objective(), late=False)
    before = leeway.share
    assert before > 0
    for late in (True, *[False] * round(1 / (AIM * 0.05) - 1)):
        leeway.add(objective(), late=late)
    assert leeway.share == pytest.approx(before)


def test_few_enough_are_late() -> None:
    """Where transfers come later the more leeway is given, the share of late ones settles below what is allowed."""
    rng = random.Random(3)
    leeway, late = Leeway(), []
    for _ in range(20_000):
        late.append(rng.random() < 0.2 * leeway.share)
        leeway.add(objective(), late=late[-1])
    assert sum(late[10_000:]) / 10_000 == pytest.approx(AIM * 0.05, abs=0.01)
