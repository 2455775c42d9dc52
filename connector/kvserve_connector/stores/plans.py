"""What was found for a request, kept until the engine has room for it."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_connector.recompute import LEAST_S, Verdict, Why
from kvserve_connector.stores.keys import ChunkKey
from kvserve_connector.stores.prefixes import Found
from kvserve_connector.stores.rates import Coding

Arriving: TypeAlias = "Future[tuple[bytearray | None, float]]"
"""A value's blob, or that there is none, and how long it took in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was found for a request, what it may take to fetch, and what of it is under way already."""

    found: Found
    codings: tuple[Coding, ...]
    verdict: Verdict
    workload: str
    traceparent: str | None
    early: dict[ChunkKey, Arriving] = field(default_factory=dict)

    def give_up(self) -> None:
        """Leave what is under way, because it is of no use any more."""
        for arriving in self.early.values():
            arriving.cancel()
        self.early.clear()


NOTHING: Final = Plan(
    found=Found(),
    codings=(),
    verdict=Verdict(fetch=True, why=Why.UNMEASURED, fetch_s=0.0, recompute_s=None, limit_s=LEAST_S),
    workload=DEFAULT_CLASS,
    traceparent=None,
)
"""Stands for a plan that is forgotten, because very many others came after it: all must be computed."""
