"""The goal MaximizeQuality in replay: loss and attainment beside every fixed profile and a clairvoyant.

The same transfers, links and truths as elsewhere in the controller's benchmark, under an objective that 95 % of the
transfers shall keep. What counts is the mean loss of those policies that keep it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from controller_midway import Midway
from controller_policies import PRICES, Static
from controller_queue import Sent
from controller_replay import Queues, Run
from controller_scenarios import PERCENTILE, Arrival, Scenario, for_quality
from controller_way import replay_on_way
from kvserve_api.profile_set import NONE

KVSERVE: Final = "kvserve"
ONCE: Final = "once"
"""KVServe that lets each transfer end as it began."""
TOLD: Final = "told"
"""The same, told the link's rate of the moment."""
PRESENT: Final = "present"
"""Knows all there is to know now, not how the link will move."""
ORACLE: Final = "oracle"
LEAST_LOSS_BP: Final = 1e-3
"""A smaller loss is none."""


class Sparing:
    """Knows the truth: takes the least loss with which this transfer is in time, and spares those behind it.

    Args:
        scenario: The truth.
        price: What each second on the server it keeps busy longest is taken to cost those behind it, in seconds.
        foresight: Whether it also knows how the link will move.
    """

    def __init__(self, scenario: Scenario, price: float, *, foresight: bool = True) -> None:
        self._scenario = scenario
        self._price = price
        self._foresight = foresight

    def choose(self, index: int, arrival: Arrival, tandem: Queues) -> str:
        """Return the least lossy that is in time, the first to end if none is."""
        found = []
        for profile in self._scenario.allowed(arrival.workload):
            work = self._scenario.work(index, profile.name)
            rate = tandem.capacity.at(max(arrival.at_s, tandem.link_free_s))
            held_s = max(work.encode_s, work.wire_bytes / rate, work.decode_s)
            own_s = tandem.preview_s(arrival.at_s, work, foresight=self._foresight)
            cost_s = own_s + self._price * held_s
            late = cost_s > (self._scenario.objective_s or math.inf)
            found.append((late, cost_s if late else profile.loss_bp, cost_s, profile.name))
        return min(found, default=(False, 0.0, 0.0, NONE))[-1]

    def sent(self, _index: int, _profile: str, _sent: Sent) -> None:
        """Learn nothing: it knew."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a policy amounts to under an objective.

    Attributes:
        loss_bp: Mean loss of the transfers, in basis points; of one that several profiles coded, the worst one's.
        attained: Share of the transfers that kept the objective.
    """

    loss_bp: float
    attained: float

    @classmethod
    def of(cls, scenario: Scenario, run: Run) -> "Kept":
        """Sum up a run."""
        losses = {name: profile.loss_bp for name, profile in scenario.profiles.items()}
        limit_s = scenario.objective_s or math.inf
        coded = [run.mixed.get(index, (name,)) for index, name in enumerate(run.chosen)]
        return cls(
            float(np.mean([max(losses[n] for n in names) for names in coded])),
            float(np.mean([total_s <= limit_s for total_s in run.total_s])),
        )


def run_all(scenario: Scenario) -> dict[str, Kept]:
    """Replay a scenario under every policy.

    Beside KVServe there is what it is worth to choose again midway, and what more knowledge would be worth at the
    beginning of each transfer: of the link's rate of the moment, of all of the present, and of what the link will do.
    """
    kept = {
        f"static-{name}": Kept.of(scenario, replay_on_way(scenario, Static(name)))
        for name in scenario.profiles
    }
    kept[KVSERVE] = of_kvserve(scenario)
    kept[ONCE] = of_kvserve(scenario, changes=False)
    kept[TOLD] = of_kvserve(scenario, changes=False, told=True)
    kept[PRESENT] = knowing(scenario, foresight=False)
    kept[ORACLE] = knowing(scenario, foresight=True)
    return kept


def of_kvserve(scenario: Scenario, *, changes: bool = True, told: bool = False) -> Kept:
    """Replay KVServe; see `Midway`."""
    scenario = replace(scenario, fine=changes)
    midway = Midway(scenario, changes=changes, told=told)
    return Kept.of(scenario, replay_on_way(scenario, midway, midway))


def knowing(scenario: Scenario, *, foresight: bool) -> Kept:
    """Replay one who knows the truth, at the price with which it keeps the objective and loses least.

    Where it never keeps it, at the price with which it does most often.
    """
    each = [
        Kept.of(scenario, replay_on_way(scenario, Sparing(scenario, price, foresight=foresight)))
        for price in PRICES
    ]
    wanted = min(PERCENTILE / 100, max(one.attained for one in each))
    return min((one for one in each if one.attained >= wanted), key=lambda one: one.loss_bp)


def run_seed(seed: int, *, quick: bool) -> dict[str, dict[str, Kept]]:
    """Replay all scenarios of a seed; by scenario and policy."""
    return {scenario.name: run_all(scenario) for scenario in for_quality(seed, quick=quick)}


def summary(name: str, seeds: Sequence[Mapping[str, Kept]]) -> dict[str, Any]:
    """Return the figures of one scenario over its seeds, each policy's mean."""
    policies = {
        policy: {
            "loss_bp": float(np.mean([each[policy].loss_bp for each in seeds])),
            "attained": float(np.mean([each[policy].attained for each in seeds])),
        }
        for policy in seeds[0]
    }
    ours = policies[KVSERVE]
    able = [
        one["loss_bp"]
        for policy, one in policies.items()
        if policy.startswith("static-") and one["attained"] >= ours["attained"]
    ]
    return {
        "name": name,
        "policies": policies,
        # JSON has no infinity
        "less_loss": min(able) / max(ours["loss_bp"], LEAST_LOSS_BP) if able else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what is printed: mean loss in basis points, and the share of the transfers that keep the objective."""
    drawn = Table(box=SIMPLE_HEAD, title="goal MaximizeQuality: loss in bp (share in time)")
    drawn.add_column("scenario", no_wrap=True)
    for policy in rows[0]["policies"]:
        drawn.add_column(policy.removeprefix("static-"), justify="right")
    drawn.add_column("fixed / KVServe", justify="right")
    for row in rows:
        drawn.add_row(
            row["name"],
            *(f"{p['loss_bp']:.1f} ({p['attained']:.1%})" for p in row["policies"].values()),
            "none so often" if row["less_loss"] is None else f"{row['less_loss']:.2f}",
        )
    return drawn
