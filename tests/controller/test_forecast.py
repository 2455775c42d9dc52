"""Percentiles of transfer times about their predictions."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.latency import Link
from kvserve_api.policy import Metric, Objective
from kvserve_api.table import Candidate, Doubt
from kvserve_controller.forecast import MOST_MARGIN, PRIOR_SD, Forecast, Spread, margin
from samples import INT4

LINK = Link(bytes_per_s=1e8)
CANDIDATE = Candidate(
    name=INT4.name,
    strategy=INT4.strategy,
    ratio=INT4.ratio,
    loss_upper_bp=INT4.loss_upper_bp,
    encode=INT4.encode,
    decode=INT4.decode,
)


def objective(percentile: int = 95, threshold_ms: int = 1000) -> Objective:
    """Return an objective for transfer times."""
    return Objective(
        name=f"p{percentile}",
        metric=Metric.KV_TRANSFER_TIME,
        percentile=percentile,
        threshold_ms=threshold_ms,
    )


def of(
    *objectives: Objective, spread: Spread, doubt: Doubt | None = None, leeway: float = 0.0
) -> float:
    """Return a candidate's margin."""
    return margin(
        replace(CANDIDATE, doubt=doubt or Doubt()),
        objectives,
        [each.threshold_ms / 1000 for each in objectives],
        leeways=[leeway] * len(objectives),
        spread=spread,
        native_bytes=5e7,
        link=LINK,
    )


def test_percentile_is_kept_by_what_the_margin_allows() -> None:
    """Of times that scatter about their predictions as many as asked are within prediction times margin."""
    rng = random.Random(7)
    forecast = Forecast()
    seen = [1.1 * math.exp(rng.gauss(0, 0.2)) for _ in range(4000)]
    for each in seen[:2000]:
        forecast.add(each, 1.0)
    assert forecast.spread.bias == pytest.approx(math.log(1.1), abs=0.06)
    for percentile in (50, 90, 99):
        allowed = of(objective(percentile), spread=Spread(math.log(1.1), 0.2))
        kept = sum(each <= allowed for each in seen[2000:]) / 2000
        assert kept == pytest.approx(percentile / 100, abs=0.025)


def test_before_any_transfer() -> None:
    """Predictions are expected to scatter, and a transfer without one says nothing."""
    forecast = Forecast()
    forecast.add(1.0, 0.0)
    forecast.add(0.0, 1.0)
    assert forecast.spread.bias == 0.0
    assert forecast.spread.sd == pytest.approx(PRIOR_SD)


def test_doubt_weighs_by_its_stage() -> None:
    """Doubt about a stage that takes no part of the time costs nothing, about one that takes all it costs in full."""
    sure = of(objective(), spread=Spread(0.0, 0.1))
    codec = of(objective(), spread=Spread(0.0, 0.1), doubt=Doubt(encode=0.5))
    wire = of(objective(), spread=Spread(0.0, 0.1), doubt=Doubt(wire=0.5))
    # 0.05 s of encoding beside 0.139 s on the wire
    assert sure < codec < wire


def test_a_leeway_lowers_the_percentile() -> None:
    """A margin at 95 % with a leeway of 10 % is that at 85 %."""
    spread = Spread(0.1, 0.3)
    assert of(objective(95), spread=spread, leeway=0.1) == pytest.approx(
        of(objective(85), spread=spread)
    )


def test_the_strictest_objective_rules() -> None:
    """A lower percentile with a shorter threshold and a higher one with a longer one are both kept."""
    spread = Spread(0.0, 0.3)
    both = of(objective(50, 1000), objective(99, 1100), spread=spread)
    assert 1.0 / both == pytest.approx(1.1 / of(objective(99, 1100), spread=spread))
    assert of(objective(50), spread=spread) == 1.0
    assert margin(CANDIDATE, [], [], leeways=[], spread=spread, native_bytes=5e7, link=LINK) == 1.0


@given(st.floats(-3, 3), st.floats(0, 5), st.sampled_from([50, 90, 95, 99]))
def test_margin_is_bounded(bias: float, sd: float, percentile: int) -> None:
    """Whatever was seen, a margin is within 1 and its limit: predictions are never believed to be too long."""
    assert 1.0 <= of(objective(percentile), spread=Spread(bias, sd)) <= MOST_MARGIN


def test_a_drop_of_the_link_is_no_scatter() -> None:
    """Two transfers of 22 that took fifty times as long leave the others' margin at 1.28 or less."""
    forecast = Forecast()
    for index in range(22):
        forecast.add(50.0 if index in (3, 4) else 1.0, 1.0)
    assert of(objective(), spread=forecast.spread) < 1.28


def test_real_scatter_is_learned() -> None:
    """Where predictions scatter by a factor of 1.8 for good, that is known after fifty transfers, to a fifth."""
    rng = random.Random(3)
    forecast = Forecast()
    for _ in range(50):
        forecast.add(math.exp(rng.gauss(0, 0.6)), 1.0)
    assert forecast.spread.sd == pytest.approx(0.6, rel=0.2)
