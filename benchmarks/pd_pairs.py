"""Ratios of paired requests, how far to trust them, and whether a target is met. Pure."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.9
LEAST_ITEMS: Final = 5
"""Fewer tell no interval: all of four can lie on one side of the median by chance once in eight times."""
LEAST_ROUNDS: Final = 3
"""Fewer do not show what changes from one to the next."""
HOLDS: Final = "holds"
MISSED: Final = "missed"
UNCLEAR: Final = "unclear"

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value: What was measured.
        low: Where the interval of `CONFIDENCE` begins; NaN if too little was measured to tell.
        high: Where it ends; NaN likewise.
        items: Of how many requests, pairs or turns it is made.
    """

    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure shall be.

    Attributes:
        sign: ``>``, ``>=`` or ``<=``.
        bound: Of the figure.
    """

    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"

    def verdict(self, found: Estimate) -> str:
        """Return `HOLDS` or `MISSED`; `UNCLEAR` if the interval holds the bound, or there is none."""
        if math.isnan(found.low) or found.low <= self.bound <= found.high:
            return UNCLEAR
        return HOLDS if (found.low > self.bound) == self.sign.startswith(">") else MISSED


def resampled(rounds: Sequence[Sequence[Item]], dice: random.Random) -> list[Item]:
    """Return items drawn with replacement: first rounds, which share what the machine did, then items of each."""
    picked = dice.choices(rounds, k=len(rounds))
    return [item for one in picked for item in dice.choices(one, k=len(one))]


def estimate(
    rounds: Sequence[Sequence[Item]],
    statistic: Callable[[Sequence[Item]], float],
    *,
    least_rounds: int = LEAST_ROUNDS,
) -> Estimate:
    """Return a statistic of all items, with its bootstrap interval; NaN of nothing.

    Args:
        rounds: Items by the round in which they were measured.
        statistic: Of items, at least one.
        least_rounds: Of fewer there is no interval.
    """
    filled = [one for one in rounds if one]
    items = [item for one in filled for item in one]
    if not items:
        return Estimate(value=math.nan, low=math.nan, high=math.nan, items=0)
    dice = random.Random(1)
    draws = [statistic(resampled(filled, dice)) for _ in range(RESAMPLES)]
    known = len(filled) >= least_rounds
    return made(statistic(items), draws if known else [], len(items))


def made(value: float, draws: Sequence[float], items: int) -> Estimate:
    """Return the estimate of a value and of its bootstrap draws, which may be infinite.

    Args:
        value: Of what was measured.
        draws: Of resamples; none if these tell nothing.
        items: Of how many it is made.
    """
    if items < LEAST_ITEMS or not draws:
        return Estimate(value=value, low=math.nan, high=math.nan, items=items)
    tail = 50 * (1 - CONFIDENCE)
    # no interpolation: between a number and infinity there is nothing
    low, high = np.percentile(draws, [tail, 100 - tail], method="inverted_cdf")
    return Estimate(value=value, low=float(low), high=float(high), items=items)


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the median of the pairs' ratios, first over second."""
    return float(np.median([a / b for a, b in pairs]))


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the mean of the pairs' firsts over that of their seconds."""
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)
