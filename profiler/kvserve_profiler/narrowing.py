"""Cutting the strategy space down to what a policy lets a run measure."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

from kvserve_api.errors import SpecError, StrategyError
from kvserve_api.profile_set import NONE
from kvserve_api.space_limits import Allow, SpaceLimits, StrategySelector
from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.space_families import planned_bases, space_of
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.registry import STAGES

_USUAL: Final = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
"""A layout for which all families exist; presets are of the same family for all."""


def check(limits: SpaceLimits) -> None:
    """Refuse limits that name what there is not, so that a typo leaves nothing in or out unseen.

    Raises:
        SpecError: A stage or a name is unknown; the error lists those known.
    """
    for part, selector in (("include", limits.include), ("exclude", limits.exclude)):
        field = f"profiling.space.{part}"
        for stage in selector.stages:
            if stage not in STAGES:
                raise SpecError(
                    f"{field}.stages", f"{stage!r} is unknown; known: {_listed(STAGES)}"
                )
        for name in selector.names:
            if name not in PRESETS and _first_word(name) not in _families().values():
                raise SpecError(
                    f"{field}.names",
                    f"{name!r} is no preset, nor does it begin with a family; presets: {_listed(PRESETS)}",
                )


def narrow(limits: SpaceLimits, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates that are within the limits, and ``none``."""
    if limits.whole:
        return tuple(candidates)
    return tuple(c for c in candidates if c.name == NONE or _within(limits, c))


def family_of(name: str) -> str:
    """Return the family of a strategy by its name, which for points of the space begins with it."""
    return _families().get(name) or _first_word(name)


def _within(limits: SpaceLimits, candidate: Candidate) -> bool:
    if limits.allow != Allow.ANY and candidate.calibrated:
        return False
    if limits.allow == Allow.LOSSLESS and not _lossless(candidate.strategy):
        return False
    if limits.include and not _chosen(limits.include, candidate):
        return False
    return not _chosen(limits.exclude, candidate)


def _chosen(selector: StrategySelector, candidate: Candidate) -> bool:
    stages = {stage.id for part in candidate.strategy.parts for stage in part.chain}
    family = family_of(candidate.name) if selector.families else ""
    return selector.chooses(family=family, name=candidate.name, stages=stages)


def _lossless(strategy: StrategyConfig) -> bool:
    try:
        return Pipeline.of(strategy).lossless
    except StrategyError:
        return False


@cache
def _families() -> Mapping[str, str]:
    """Return the family of each preset."""
    presets = space_of(_USUAL, planned_bases()).presets()
    return {name: point.family for name, point in presets.items()}


def _first_word(name: str) -> str:
    return name.partition("-")[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
