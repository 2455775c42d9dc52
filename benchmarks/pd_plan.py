"""What ``make bench-pd`` runs: links, loads, policies, and when they take turns. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

RAW: Final = "raw"
ALONE: Final = "alone"
"""No transfer: the prefill engine does all of a request."""
KVSERVE: Final = "kvserve"
KVSERVE_QUALITY: Final = "kvserve-quality"
OURS: Final = (KVSERVE, KVSERVE_QUALITY)
STATICS: Final = ("focus-3-fine", "focus-3", "joint-3-fine")
"""Over the moving link, in every round: within the quality budget, and each can be the best."""
SELDOM: Final = ("joint-3-finer", RAW)
"""Over the moving link, in its first rounds only: they are far from the best there, and raw waits for itself."""
SELDOM_ROUNDS: Final = 3
"""In so many: of fewer there is no interval, and with one alone some redrawn sets had no late request."""
SMALL: Final = "joint-10"
FEW: Final = ("cachegen", SMALL)
"""In the paper's regime."""
ONE_BY_ONE: Final = "one by one"
OVERLAP: Final = "overlap"
PAPERS_REGIME: Final = "paper's regime"
MOVING: Final = "moving"
RATES_MBIT: Final = (100, 1000)
HIDING: Final = "focus-3-fine"
"""The profile with which it is measured how much of a transfer hides behind its prefill: of all presets its ratio, 11.4
on SmolLM2, is the nearest to the twelve that the target names."""
LATE: Final = " after prefill"
"""Marks a policy whose decode engine asks when the prefill has ended, not when it begins."""
RATE_SHARE: Final = 0.04
"""Of the time, for each of these."""
REGIME: Final = 10.0
"""The paper's regime: raw transfer takes at least so many times as long as prefill."""
REGIME_AIM: Final = 12.0
"""What the link is set to, by the prefill measured before: prefills get slower, too, while raw transfers go on."""
BITS_A_TOKEN: Final = 23_040 * 8
"""Keys and values of SmolLM2-135M in bfloat16."""
SLOW_MBIT: Final = 20.0
MOVES_MBIT: Final = (SLOW_MBIT, 100.0, None, 100.0)
"""The rates of the moving link, in turn; None unshaped."""
PHASE_S: Final = 6.0
"""How long it keeps each of them."""
COURSE_S: Final = PHASE_S * len(MOVES_MBIT)
"""How long all of them take."""
START_S: Final = 75.0
LOAD: Final = 0.3
"""Where the engines' cores are two threads of one, each takes up to 1.6 times as long while the other computes, and
coding comes on top: half the time alone was nearly all of it, and a cell showed little but the luck of its queue."""
GENERATED: Final = 16
"""Tokens generated a request."""
FULL_MINUTES: Final = 20.0
"""With less time rounds have fewer requests."""
LEAST: Final = 2
"""Requests that a round has at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A link and a load, under which several policies are compared.

    Attributes:
        name: Of the condition.
        policies: Which are compared.
        requests: How many in a round, the same for every policy.
        rounds: Policies take turns at most so many times, with other requests each time.
        ends: The share of all the time after which no further round begins.
        mbit: The link's rate; None unshaped. Of a moving link, the rate when it is slow.
        regime: Native bytes take so many times as long as their prefill: gives the rate. 0: `mbit` is it.
        moving: The link's rate changes as `Moves` says.
        load: The share of the time for which requests would keep the prefill engine busy alone; 0: each waits for the
            one before.
        seldom: Which of the policies only have a turn in the first `SELDOM_ROUNDS`, behind all others.
        lasts_s: A round has only as many requests as arrive in so long, and they arrive over all of it; 0: as long as
            they need.
    """

    name: str
    policies: tuple[str, ...]
    requests: int
    rounds: int = 1
    ends: float = 0.0
    mbit: float | None = None
    regime: float = 0.0
    moving: bool = False
    load: float = 0.0
    seldom: tuple[str, ...] = ()
    lasts_s: float = 0.0

    def order(self, number: int) -> tuple[str, ...]:
        """Return the policies of a round, the first of which is number 0, in the order of their turns."""
        # each is first as often: what changes within a round meets all
        steady = tuple(policy for policy in self.policies if policy not in self.seldom)
        by = number % len(steady)
        # the first rounds and no others: pairs are found by counting
        return steady[by:] + steady[:by] + (self.seldom if number < SELDOM_ROUNDS else ())

    def link_mbit(self, prefill_s_per_token: float) -> float | None:
        """Return the link's rate, by what a prefill takes."""
        if not self.regime:
            return self.mbit
        return BITS_A_TOKEN / (self.regime * prefill_s_per_token) / 1e6

    def count(self, prefill_s_per_token: float, mean_tokens: float) -> int:
        """Return how many requests a round has."""
        if not self.lasts_s:
            return self.requests
        arriving = round(self.lasts_s * self.per_s(prefill_s_per_token, mean_tokens))
        return max(LEAST, min(self.requests, arriving))

    def arrivals_s(self, at_s: Sequence[float], per_s: float) -> list[float]:
        """Return when a round's requests arrive.

        Args:
            at_s: When they would, if one arrived in a second in the mean.
            per_s: How many arrive; 0: each waits for the one before.
        """
        if not per_s:
            return [0.0] * len(at_s)
        # few requests seldom arrive over all of a course by themselves, and then miss some of its rates
        each_s = self.lasts_s / (at_s[-1] + 1) if self.lasts_s else 1 / per_s
        return [one * each_s for one in at_s]

    def per_s(self, prefill_s_per_token: float, mean_tokens: float) -> float:
        """Return how many requests arrive in a second; 0: each waits for the one before."""
        return self.load / (prefill_s_per_token * mean_tokens)


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


def plan(minutes: float, *, quick: bool) -> tuple[Condition, ...]:
    """Return the conditions. What the time decides is the number of requests, never what is compared.

    Args:
        minutes: For everything but the engines' start.
        quick: Only what the claims need most, and few policies.
    """
    if quick:
        return _quick()

    def scaled(requests: int) -> int:
        return max(LEAST, math.ceil(requests * min(1.0, minutes / FULL_MINUTES)))

    one_by_one = Condition(
        name=ONE_BY_ONE, policies=(ALONE, RAW, KVSERVE), requests=scaled(4), rounds=16, ends=0.15
    )
    regime = Condition(
        name=PAPERS_REGIME,
        policies=(RAW, KVSERVE, *FEW),
        # raw transfers wait for each other there, which the first ones do not show
        requests=scaled(8),
        regime=REGIME_AIM,
        load=LOAD,
    )
    overlap = replace(
        one_by_one,
        name=OVERLAP,
        mbit=100.0,
        policies=(HIDING + LATE, HIDING),
        requests=scaled(3),
        rounds=6,
        ends=0.28,
    )
    rates = (
        Condition(
            name=f"{mbit} Mbit/s",
            mbit=float(mbit),
            policies=(RAW, KVSERVE, SMALL),
            requests=scaled(3),
            rounds=4,
            ends=1 - (len(RATES_MBIT) - number) * RATE_SHARE,
            load=LOAD,
        )
        for number, mbit in enumerate(RATES_MBIT, start=1)
    )
    moving = Condition(
        name=MOVING,
        mbit=SLOW_MBIT,
        moving=True,
        policies=(*OURS, *STATICS, *SELDOM),
        seldom=SELDOM,
        requests=scaled(12),
        # so that a turn meets each of the rates, once
        lasts_s=COURSE_S,
        rounds=16,
        ends=1 - len(RATES_MBIT) * RATE_SHARE,
        load=LOAD,
    )
    # what the claims need comes first: a run that takes longer than was thought is cut at its end
    return (one_by_one, overlap, regime, moving, *rates)


def _quick() -> tuple[Condition, ...]:
    return (
        Condition(name=ONE_BY_ONE, policies=(ALONE, RAW, KVSERVE), requests=LEAST),
        Condition(
            name=PAPERS_REGIME,
            policies=(RAW, KVSERVE),
            requests=LEAST,
            regime=REGIME_AIM,
            load=LOAD,
        ),
        Condition(
            name=MOVING,
            mbit=SLOW_MBIT,
            moving=True,
            policies=(*OURS, "focus-3-fine"),
            requests=4,
            lasts_s=COURSE_S / 2,
            load=LOAD,
        ),
    )


def another(condition: Condition, done: int, turns_s: Mapping[str, float], left_s: float) -> bool:
    """Tell whether a further round of a condition begins; the first one always does.

    Args:
        condition: Which.
        done: How many rounds it had.
        turns_s: How long each policy's last turn took.
        left_s: Until the condition's share of the time ends.
    """
    if not done:
        return True
    round_s = sum(turns_s.get(policy, 0.0) for policy in condition.order(done))
    return done < condition.rounds and round_s <= left_s
