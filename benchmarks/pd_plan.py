"""What ``make bench-pd`` runs: links, policies, and how many requests fit into the time there is. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

RAW: Final = "raw"
ALONE: Final = "alone"
"""No transfer: the prefill engine does all of a request."""
KVSERVE: Final = "kvserve"
KVSERVE_QUALITY: Final = "kvserve-quality"
OURS: Final = (KVSERVE, KVSERVE_QUALITY)
STATICS: Final = ("int8-token", "focus-3-fine", "joint-3-fine", "joint-3", "focus-3")
"""Over the moving link; all within the quality budget."""
FEW: Final = ("cachegen", "joint-10")
"""At constant rates."""
MOST: Final = 40
LEAST: Final = 2
SINGLES: Final = 16
"""At least so many one by one: what is held against a few per cent must not rest on two."""
ROUNDS: Final = 4
"""Requests one by one are spread over so many turns of all policies: what the machine does meanwhile meets all."""
COURSE: Final = 12
"""A turn on the moving link has at least so many requests, so that it meets each of the rates; two turns if it can."""
QUEUED: Final = 12
"""At least so many in the paper's regime: raw transfers wait for each other there, which the first ones do not show."""
ONE_BY_ONE: Final = "one by one"
OVERLAP: Final = "overlap"
PAPERS_REGIME: Final = "paper's regime"
MOVING: Final = "moving"
RATES_MBIT: Final = (20, 50, 100, 1000)
HIDING: Final = "joint-10"
"""The profile with which it is measured how much of a transfer hides behind its prefill."""
LATE: Final = " after prefill"
"""Marks a policy whose decode engine asks when the prefill has ended, not when it begins."""
REGIME: Final = 10.0
"""The paper's regime: raw transfer takes so many times as long as prefill."""
BITS_A_TOKEN: Final = 23_040 * 8
"""Keys and values of SmolLM2-135M in bfloat16."""
SLOW_MBIT: Final = 20.0
MOVES_MBIT: Final = (SLOW_MBIT, 100.0, None, 100.0)
"""The rates of the moving link, in turn; None unshaped."""
PHASE_S: Final = 6.0
"""How long it keeps each of them."""
SWITCH_S: Final = 2.5
"""A policy's table reaching the engines."""
START_S: Final = 75.0
LOAD: Final = 0.3
"""Where the engines' cores are two threads of one, each takes up to 1.6 times as long while the other computes, and
coding comes on top: half the time alone was nearly all of it, and a cell showed little but the luck of its queue."""
GENERATED: Final = 16
"""Tokens generated a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A link and a load, under which several policies are compared.

    Attributes:
        name: Of the condition.
        mbit: The link's rate; None unshaped. Of a moving link, the rate when it is slow.
        moving: The link's rate changes as `Moves` says.
        requests: How many, the same for every policy.
        per_s: How many arrive in a second; 0: each waits for the one before.
        policies: Which are compared.
        seed: Of arrivals and prompts.
        rounds: Policies take turns so many times, each time with a part of the requests.
    """

    name: str
    mbit: float | None
    requests: int
    per_s: float
    policies: tuple[str, ...]
    moving: bool = False
    seed: int = 1
    rounds: int = 1

    def turns(self) -> list[slice]:
        """Return which of the requests belong to each round; no round is empty."""
        rounds = min(self.rounds, self.requests)
        edges = [self.requests * i // rounds for i in range(rounds + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def least_s(self, job_s: float, mean_tokens: float) -> float:
        """Estimate how long it takes.

        Args:
            job_s: A request alone, without its transfer.
            mean_tokens: Of a prompt.
        """
        arriving_s = self.requests / self.per_s if self.per_s else self.requests * job_s
        raw_s = 0.0
        if self.mbit is not None and not self.moving:
            raw_s = self.requests * mean_tokens * BITS_A_TOKEN / (self.mbit * 1e6)
        each_s = arriving_s + len(self.turns()) * (job_s + SWITCH_S)
        raw_extra_s = max(0.0, raw_s - arriving_s) if RAW in self.policies else 0.0
        return len(self.policies) * each_s + raw_extra_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """When a moving link changes.

    Attributes:
        rates_mbit: Its rates in turn; None unshaped.
        phase_s: How long it keeps each of them.
    """

    rates_mbit: tuple[float | None, ...] = MOVES_MBIT
    phase_s: float = PHASE_S

    def mbit(self, at_s: float) -> float | None:
        """Return the rate at a time; None unshaped."""
        return self.rates_mbit[int(at_s / self.phase_s) % len(self.rates_mbit)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What this machine does, measured before the plan is made.

    Attributes:
        prefill_s_per_token: Of the prefill engine.
        job_s: A mean request alone.
        request_s: A request of one token for one token, of the decode engine.
        mean_tokens: Of a prompt.
    """

    prefill_s_per_token: float
    job_s: float
    request_s: float
    mean_tokens: float

    @property
    def regime_mbit(self) -> float:
        """The rate at which a raw transfer takes `REGIME` times as long as its prefill."""
        return BITS_A_TOKEN / (REGIME * self.prefill_s_per_token) / 1e6

    @property
    def per_s(self) -> float:
        """An open load that would keep the prefill engine alone busy for `LOAD` of the time."""
        return LOAD / (self.prefill_s_per_token * self.mean_tokens)


def plan(speeds: Speeds, *, budget_s: float, quick: bool) -> tuple[Condition, ...]:
    """Return the conditions, with as many requests each as fit into the time, and never fewer than `LEAST`.

    Args:
        speeds: Of this machine.
        budget_s: For everything but the engines' start.
        quick: Only what the claims need most, and few policies.
    """
    for requests in range(MOST, LEAST, -1):
        conditions = _conditions(speeds, requests, quick=quick)
        if estimated_s(conditions, speeds) <= budget_s:
            return conditions
    return _conditions(speeds, LEAST, quick=quick)


def estimated_s(conditions: Sequence[Condition], speeds: Speeds) -> float:
    """Estimate how long conditions take."""
    return sum(c.least_s(speeds.job_s, speeds.mean_tokens) for c in conditions)


def _conditions(speeds: Speeds, requests: int, *, quick: bool) -> tuple[Condition, ...]:
    fixed = (RAW, *FEW, KVSERVE)
    base = Condition(name="", mbit=None, requests=requests, per_s=speeds.per_s, policies=fixed)
    one_by_one = replace(base, name=ONE_BY_ONE, per_s=0.0, policies=(ALONE, RAW, KVSERVE))
    regime = replace(base, name=PAPERS_REGIME, mbit=speeds.regime_mbit)
    moving = replace(base, name=MOVING, mbit=SLOW_MBIT, moving=True)
    if quick:
        return (
            one_by_one,
            replace(regime, policies=(RAW, KVSERVE)),
            replace(moving, requests=2 * requests, policies=(RAW, "joint-3", *OURS)),
        )
    one_by_one = replace(one_by_one, requests=max(requests, SINGLES), rounds=ROUNDS)
    regime = replace(regime, requests=max(requests, QUEUED))
    overlap = replace(one_by_one, name=OVERLAP, mbit=100.0, policies=(HIDING + LATE, HIDING))
    rates = (replace(base, name=f"{mbit} Mbit/s", mbit=float(mbit)) for mbit in RATES_MBIT)
    # what the claims need comes first: a run that takes longer than was thought is cut at its end
    return (
        one_by_one,
        regime,
        replace(
            moving,
            requests=3 * requests,
            policies=(*OURS, RAW, *STATICS),
            rounds=max(1, min(2, 3 * requests // COURSE)),
        ),
        overlap,
        replace(base, name="unshaped", policies=(RAW, "joint-3", KVSERVE)),
        *rates,
    )
