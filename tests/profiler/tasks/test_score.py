"""The limit of a difference of paired proportions is the score interval's."""

import math

import numpy as np
import pytest

from kvserve_api.fields import Fields
from kvserve_api.quality import TaskScore
from kvserve_profiler.tasks.score import compare, upper_difference

Z95 = 1.6448536269514722


@pytest.mark.parametrize(
    ("lost", "gained", "items"), [(5, 5, 100), (9, 1, 50), (12, 2, 50), (0, 2, 40)]
)
def test_limit_solves_the_score_equation(lost: int, gained: int, items: int) -> None:
    """At the limit the score statistic, with the share maximised over a fine grid, is the normal quantile."""
    limit = upper_difference(lost, gained, items, confidence_percent=95)
    share = np.linspace(0, (1 - limit) / 2, 2_000_001)[1:-1]
    likelihood = (
        lost * np.log(share + limit)
        + gained * np.log(share)
        + (items - lost - gained) * np.log(1 - 2 * share - limit)
    )
    best = share[np.argmax(likelihood)]
    statistic = (lost - gained - items * limit) / math.sqrt(
        items * (2 * best + limit * (1 - limit))
    )
    assert statistic == pytest.approx(-Z95, abs=1e-4)


@pytest.mark.parametrize("items", [1, 64, 1000])
def test_nothing_lost_is_not_certainty(items: int) -> None:
    """Without a lost item the limit is z² / (n + z²), as for a single proportion."""
    limit = upper_difference(0, 0, items, confidence_percent=95)
    assert limit == pytest.approx(Z95**2 / (items + Z95**2), rel=1e-9)


def test_more_lost_is_a_higher_limit() -> None:
    """The limit grows with the items lost and is never below the difference."""
    limits = [upper_difference(lost, 3, 60, confidence_percent=95) for lost in range(58)]
    assert limits == sorted(limits)
    assert all(limit >= (lost - 3) / 60 for lost, limit in enumerate(limits))
    assert upper_difference(1, 0, 1, confidence_percent=95) == 1.0


def test_a_gain_is_no_loss() -> None:
    """Where compression surely made more right, nothing is lost."""
    assert upper_difference(0, 9, 40, confidence_percent=95) == pytest.approx(0, abs=1e-15)


def test_compare() -> None:
    """Shares are of all items; the loss is their difference, and a score survives JSON."""
    score = compare(
        [True] * 8 + [False] * 2, [True] * 6 + [False] * 3 + [True], confidence_percent=95
    )
    assert (score.items, score.exact, score.compressed) == (10, 0.8, 0.7)
    assert score.loss_bp == pytest.approx(1000)
    assert score.loss_upper_bp == pytest.approx(
        1e4 * upper_difference(2, 1, 10, confidence_percent=95)
    )
    assert TaskScore.from_json(Fields(score.to_json())) == score
