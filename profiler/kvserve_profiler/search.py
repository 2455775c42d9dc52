"""Which strategy to measure next.

A pure function of the space and the trials so far, so that a resumed run goes on as if nothing had happened.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvserve_api.profile_set import NONE
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies.presets import PRESETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A strategy under the name its profile gets.

    Attributes:
        name: A DNS label.
        strategy: What to measure.
    """

    name: str
    strategy: StrategyConfig


def suggest(
    space: Sequence[Candidate], measured: Collection[str], max_trials: int
) -> Candidate | None:
    """Return the next strategy to measure: the first of the space that was not measured.

    Args:
        space: What may be measured, the most useful first.
        measured: Digests of the strategies that were measured, with success or without.
        max_trials: Most strategies to measure.

    Returns:
        The candidate, or None when the run is over.
    """
    rest = (c for c in space if c.strategy.digest not in measured)
    return next(rest, None) if len(measured) < max_trials else None


def preset_space() -> tuple[Candidate, ...]:
    """Return the presets, ``none`` first: without it there is no Pareto set."""
    named = {name: Candidate(name=name, strategy=strategy) for name, strategy in PRESETS.items()}
    return (named.pop(NONE), *named.values())
