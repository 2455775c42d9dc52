"""The strategies of a run: the presets, and the points of the strategy space around them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from kvserve_api.canonical import digest
from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NONE
from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_profiler.space_families import bases_of, space_of
from kvserve_strategies import PRESETS, config_needs_bundle
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.peers import PEERS

LOSSLESS: Final = "lossless"
ALWAYS: Final = (NONE, LOSSLESS)
"""Measured before anything else: without the first there is no set, and the second meets every budget."""
PER_TRIAL: Final = 16
"""Candidates whose ratio is screened for each trial that may be made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A strategy under the name its profile gets.

    Attributes:
        name: A DNS label.
        strategy: What to measure.
        features: What a surrogate model sees of it; empty outside the space.
    """

    name: str
    strategy: StrategyConfig
    features: tuple[float, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether it needs a calibration bundle; a strategy that can't work needs none."""
        try:
            return config_needs_bundle(self.strategy)
        except StrategyError:
            return False


Grid: TypeAlias = Callable[[KVLayout, Bundle | None], Sequence[Candidate]]
"""Returns the candidates of the strategy space for a model and its calibration."""


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


def grid(layout: KVLayout, bundle: Bundle | None) -> tuple[Candidate, ...]:
    """Return every point of the strategy space that a model and its calibration can have."""
    space = space_of(layout, None if bundle is None else bases_of(bundle))
    points = space.points()
    return tuple(
        Candidate(name=space.name_of(point), strategy=space.strategy(point), features=tuple(row))
        for point, row in zip(points, space.features(points).tolist(), strict=True)
    )


def gather(
    named: Sequence[Candidate], points: Sequence[Candidate], *, max_trials: int, seed: int
) -> tuple[Candidate, ...]:
    """Return the candidates of a run: those named, with their features, and a sample of the space.

    Args:
        named: They come first, in this order.
        points: The strategy space; all with the same number of features.
        max_trials: Most trials of the run: so many times `PER_TRIAL` candidates are worth screening.
        seed: Of the sample.
    """
    known = {point.strategy.digest: point for point in points}
    width = len(points[0].features) if points else 0
    first = [
        known.get(one.strategy.digest)
        or Candidate(name=one.name, strategy=one.strategy, features=(0.0,) * width)
        for one in named
    ]
    taken = {one.strategy.digest for one in first}
    rest = [point for key, point in known.items() if key not in taken]
    room = min(max(PER_TRIAL * max_trials - len(first), 0), len(rest))
    chosen = np.random.default_rng(seed).permutation(len(rest))[:room]
    return (*first, *(rest[index] for index in sorted(chosen)))


def pool_digest(candidates: Sequence[Candidate]) -> str:
    """Return what tells one list of candidates from another."""
    return digest([candidate.strategy.digest for candidate in candidates])
