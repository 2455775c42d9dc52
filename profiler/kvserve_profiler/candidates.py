"""Which strategy to measure next.

A pure function of the space and the trials so far, so that a resumed run goes on as if nothing had happened.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NONE
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import PRESETS, config_needs_bundle
from kvserve_strategies.peers import PEERS

LOSSLESS: Final = "lossless"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A strategy under the name its profile gets.

    Attributes:
        name: A DNS label.
        strategy: What to measure.
    """

    name: str
    strategy: StrategyConfig

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration bundle; a strategy that can't work needs none."""
        try:
            return config_needs_bundle(self.strategy)
        except StrategyError:
            return False


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
    """Return the presets, the most useful first.

    That is ``none``, without which there is no set, ``lossless``, which meets every budget, then ours that are
    calibrated, our others, the peers'.
    """
    named = [Candidate(name=name, strategy=strategy) for name, strategy in PRESETS.items()]
    # a short budget of trials goes to those that are seldom beaten
    return tuple(
        sorted(
            named,
            key=lambda c: (c.name != NONE, c.name != LOSSLESS, c.name in PEERS, not c.calibrated),
        )
    )
