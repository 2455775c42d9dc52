"""One scenario under one policy: who decides, what is sent, how long it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from controller_queue import Capacity, Sent, Tandem, Work
from controller_scenarios import Arrival, Scenario


class Queues(Protocol):
    """The true state of one pair's servers."""

    capacity: Capacity
    link_free_s: float

    def preview_s(self, now_s: float, work: Work, *, foresight: bool = True) -> float:
        """Return how long a transfer would take if it began now and none came after it; changes nothing."""
        ...


class Decider(Protocol):
    """A policy: chooses a profile for each transfer, and may watch what becomes of it."""

    def choose(self, index: int, arrival: Arrival, tandem: Queues) -> str:
        """Return the profile of an arrival.

        Args:
            index: Its number.
            arrival: It.
            tandem: The true state of the queues at its time; only oracles may look.
        """

    def sent(self, index: int, profile: str, sent: Sent) -> None:
        """Take note of what the choice led to; `Sent` fills as the replay's time passes."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a policy did.

    Attributes:
        chosen: The profile of each arrival.
        total_s: What each transfer took.
        violations: Transfers with a profile that exceeds their class's quality budget.
        mixed: Of each arrival that several profiles coded, what coded its chunks.
    """

    chosen: tuple[str, ...]
    total_s: tuple[float, ...]
    violations: int
    mixed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def mean_s(self) -> float:
        """The mean over the transfers."""
        return float(np.mean(self.total_s))

    def percentile_s(self, percent: float) -> float:
        """Return a percentile over the transfers."""
        return float(np.percentile(self.total_s, percent))

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the run."""
        return {
            "mean_s": self.mean_s,
            "p95_s": self.percentile_s(95),
            "violations": self.violations,
        }


def replay(scenario: Scenario, decider: Decider) -> Run:
    """Send all arrivals as a policy decides."""
    tandem = Tandem(scenario.capacity, scenario.rtt_s)
    transfers: list[Sent] = []
    chosen: list[str] = []
    for index, arrival in enumerate(scenario.arrivals):
        tandem.advance(arrival.at_s)
        name = decider.choose(index, arrival, tandem)
        sent = tandem.send(arrival.at_s, scenario.work(index, name))
        decider.sent(index, name, sent)
        transfers.append(sent)
        chosen.append(name)
    tandem.finish()
    return Run(
        chosen=tuple(chosen),
        total_s=tuple(sent.total_s for sent in transfers),
        violations=violations(scenario, [[name] for name in chosen]),
    )


def violations(scenario: Scenario, chosen: Sequence[Sequence[str]]) -> int:
    """Return how many transfers are coded by a profile that exceeds the quality budget of their class."""
    losses: Mapping[str, float] = {
        name: profile.loss_upper_bp for name, profile in scenario.profiles.items()
    }
    return sum(
        max(losses[name] for name in names) > scenario.budgets_bp[arrival.workload]
        for names, arrival in zip(chosen, scenario.arrivals, strict=True)
    )
