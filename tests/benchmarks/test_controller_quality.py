"""The goal MaximizeQuality in replay: what is compared, and that its figures mean what they say."""

from dataclasses import replace

import pytest

import controller_profiles as profiles
import controller_quality as quality
from controller_policies import Static
from controller_quality import KVSERVE, Kept, Sparing
from controller_queue import Capacity
from controller_replay import Run
from controller_scenarios import (
    MBIT,
    SMOLLM2,
    SMOLLM2_LAYOUT,
    Arrival,
    Factors,
    Scenario,
    for_quality,
    scenarios,
)
from controller_traces import sampled
from controller_way import replay_on_way

TOKENS = 900


def scenario(mbit: float, count: int = 10) -> Scenario:
    """Return transfers of 900 tokens every 3 s over a steady link, exactly as profiled, that have 2 s each."""
    pareto = profiles.serving()
    return Scenario(
        name="steady",
        pareto=pareto,
        default="focus-3-fine",
        budgets_bp={"default": 100},
        arrivals=tuple(Arrival(3.0 * n, int(TOKENS * SMOLLM2)) for n in range(count)),
        capacity=Capacity.of([0], [mbit * MBIT]),
        rtt_s=0.001,
        prior_bytes_per_s=mbit * MBIT,
        truth={profile.name: Factors() for profile in pareto.profiles("default")},
        scatter=(Factors(),) * count,
        objective_s=2.0,
        layout=SMOLLM2_LAYOUT,
    )


@pytest.mark.parametrize(
    ("mbit", "least"),
    [
        pytest.param(1000, {"none", "lossless"}, id="fast"),
        pytest.param(50, {"int8-token"}, id="int8-takes-1.8-s"),
        pytest.param(20, {"focus-3-fine"}, id="int8-takes-4.4-s"),
    ],
)
def test_least_loss_in_time(mbit: float, least: set[str]) -> None:
    """The clairvoyant takes the least lossy profile that is in time, and no other."""
    one = scenario(mbit)
    run = replay_on_way(one, Sparing(one, 0.0))
    assert set(run.chosen) <= least
    assert Kept.of(one, run).attained == 1.0


@pytest.mark.parametrize("mbit", [20, 1000])
def test_steady_link_loses_what_must_be_lost(mbit: float) -> None:
    """On a link that does not move KVServe keeps the objective with the clairvoyant's loss."""
    one = scenario(mbit)
    ours = quality.of_kvserve(one)
    assert ours == Kept.of(one, replay_on_way(one, Sparing(one, 0.0)))
    assert ours == quality.of_kvserve(one, changes=False)


def test_who_knows_the_present_only_is_caught_by_a_fall() -> None:
    """A link of 1 Gbit/s that falls to 20 Mbit/s under way makes raw transfers late, but not who saw it come."""
    one = replace(
        scenario(1000, count=1), capacity=Capacity.of([0, 0.01], [1000 * MBIT, 20 * MBIT])
    )
    present = quality.knowing(one, foresight=False)
    assert (present.loss_bp, present.attained) == (0.0, 0.0)
    assert quality.knowing(one, foresight=True).attained == 1.0


def test_being_told_the_rate_helps_where_it_moves() -> None:
    """On a link that is slow from the second transfer on, who is told so is in time; who must see it first is not."""
    one = replace(scenario(1000, count=2), capacity=Capacity.of([0, 2.5], [1000 * MBIT, 20 * MBIT]))
    seen, told = (quality.of_kvserve(one, changes=False, told=each) for each in (False, True))
    assert (seen.attained, told.attained) == (0.5, 1.0)


def test_what_a_fall_catches_is_coded_coarser() -> None:
    """Raw transfers that meet a fall from 1 Gbit/s to 20 Mbit/s are late if they end as they began."""
    one = replace(
        scenario(1000, count=3), capacity=Capacity.of([0, 0.01], [1000 * MBIT, 20 * MBIT])
    )
    once, midway = (quality.of_kvserve(one, changes=each) for each in (False, True))
    assert once.attained < midway.attained


def test_a_mixed_transfer_counts_as_its_worst_part() -> None:
    """Of a transfer that several profiles coded the loss is that of the one that loses most."""
    one = scenario(1000, count=2)
    run = Run(
        chosen=("none", "none"),
        total_s=(1.0, 3.0),
        violations=0,
        mixed={1: ("none", "focus-3", "int8-token")},
    )
    assert Kept.of(one, run).loss_bp == pytest.approx(45.11 / 2)
    assert Kept.of(one, run).attained == 0.5


def test_share_and_loss_by_hand() -> None:
    """Raw transfers of 8.3 s on 20 Mbit/s lose nothing and are late; the mean loss is that of what was chosen."""
    one = scenario(20)
    assert Kept.of(one, replay_on_way(one, Static("none"))) == Kept(0.0, 0.0)
    kept = Kept.of(one, replay_on_way(one, Static("focus-3")))
    assert kept.loss_bp == pytest.approx(45.11)
    assert kept.attained == 1.0


def test_compared_are_those_that_keep_it_as_often() -> None:
    """The gain is over the least lossy fixed profile that keeps the objective as often, and infinite without one."""
    seeds = [{"static-a": Kept(0.0, 0.5), "static-b": Kept(18.0, 0.97), KVSERVE: Kept(6.0, 0.96)}]
    assert quality.summary("x", seeds)["less_loss"] == pytest.approx(3.0)
    seeds = [seeds[0] | {KVSERVE: Kept(6.0, 0.98)}]
    assert quality.summary("x", seeds)["less_loss"] is None


def test_seeds_differ_in_truth_not_in_what_is_asked() -> None:
    """Two seeds have other arrivals and codecs, the same objective and link; latency's scenarios have none."""
    first, second = next(for_quality(1, quick=True)), next(for_quality(2, quick=True))
    assert first.objective_s == second.objective_s == 2.0
    assert first.truth != second.truth
    assert first.arrivals != second.arrivals
    assert next(scenarios(sampled(), 1, quick=True)).objective_s is None
