"""A decision table with everything built that its profiles need.

A table is made ready once, when it arrives: its pipelines are built, with the calibration bundles that were fetched for
it, and for each kind of consumer the candidates that it can't decode are struck out. A new table replaces all of it at
once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeAlias

from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NONE
from kvserve_api.table import DecisionTable
from kvserve_strategies import Pipeline
from kvserve_strategies.bundle import Bundle

MAX_VIEWS: Final = 64
_NO_BUNDLES: Final[Mapping[str, Bundle]] = MappingProxyType({})
Carries: TypeAlias = Callable[[Pipeline], bool]
"""Tells of a pipeline whether it may code an engine's cache."""


def carries_all(pipeline: Pipeline) -> bool:
    """Let every pipeline code: the cache is plain keys and values."""
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyTable:
    """A table with everything built that its profiles need.

    Attributes:
        table: The table.
        pipelines: For each candidate that may code this engine's cache its pipeline.
        bundles: Every calibration bundle that they use, by digest.
        views: For each set of stages and bundles a consumer has: the table without what it can't decode. Filled on
            demand.
    """

    table: DecisionTable
    pipelines: Mapping[str, Pipeline]
    bundles: Mapping[str, Bundle] = field(default_factory=dict)
    views: dict[tuple[frozenset[str], frozenset[str]], DecisionTable] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        table: DecisionTable,
        bundles: Mapping[str, Bundle] = _NO_BUNDLES,
        carries: Carries = carries_all,
    ) -> "ReadyTable":
        """Build what the table needs.

        Args:
            table: The table.
            bundles: The calibration bundles that it wants, by digest.
            carries: Tells of a pipeline whether it may code this engine's cache; candidates that may not are left out.

        Raises:
            StrategyError: A strategy can't work here, or not without a bundle.
        """
        pipelines = {
            name: Pipeline.of(candidate.strategy, bundles.get(candidate.bundle or ""))
            for name, candidate in table.candidates.items()
            if name == NONE or carries(Pipeline.of(candidate.strategy))
        }
        for name, pipeline in pipelines.items():
            if pipeline.calibrated and pipeline.bundle is None:
                raise StrategyError(name, "needs a calibration bundle, and the table names none")
        return cls(table=table, pipelines=pipelines, bundles=bundles)

    def decodable(self, stages: frozenset[str], bundles: frozenset[str]) -> DecisionTable:
        """Return the table as it applies to a consumer with these stages and bundles."""
        view = self.views.get((stages, bundles))
        if view is None:
            able = {
                name
                for name, pipeline in self.pipelines.items()
                if stages.issuperset(pipeline.stage_ids)
                and (pipeline.bundle is None or pipeline.bundle.digest in bundles)
            }
            view = _restrict(self.table, able | {NONE})
            if len(self.views) < MAX_VIEWS:
                self.views[stages, bundles] = view
        return view


def _restrict(table: DecisionTable, able: set[str]) -> DecisionTable:
    """Return the table with only what a consumer can decode; the table itself if that is all."""
    if able.issuperset(table.candidates):
        return table
    rules = {
        name: replace(
            rule,
            candidates=tuple(c for c in rule.candidates if c in able) or (NONE,),
            margins={c: margin for c, margin in rule.margins.items() if c in able},
        )
        for name, rule in table.rules.items()
    }
    pinned = NONE if table.pinned is not None and table.pinned not in able else table.pinned
    fallback = table.fallback if table.fallback in able else NONE
    return replace(table, rules=rules, pinned=pinned, fallback=fallback)
