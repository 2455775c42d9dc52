"""The codings in which a reader takes a stored prefix, and the one in which a writer leaves it."""

from dataclasses import dataclass

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_connector.ready import ReadyTable
from kvserve_connector.stores.keys import Rate
from kvserve_connector.stores.link import PRIOR_DECODE
from kvserve_strategies import Pipeline, preset

LOSSLESS = "lossless"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """One way in which a chunk may be stored.

    Attributes:
        name: Of the profile.
        pipeline: What codes it.
        ratio: The ratio to expect.
        decode: The cost of decoding to expect.
    """

    name: str
    pipeline: Pipeline
    ratio: float = 1.0
    decode: StageCost = PRIOR_DECODE

    @property
    def rate(self) -> Rate:
        """Its name in a store."""
        return Rate.of(self.pipeline)


def readable(ready: ReadyTable | None, workload: str, fixed: str | None) -> tuple[Coding, ...]:
    """Return what a request of a workload class may be given, the smallest first.

    These are the profiles that its table allows the class, what loses nothing, and the one that this pod itself stores.

    Args:
        ready: The table in force; None without one.
        workload: The class.
        fixed: Preset that this pod stores everything with.
    """
    found = {name: _preset(name) for name in (NONE, LOSSLESS, fixed) if name}
    if ready is not None:
        table = ready.table
        rule = table.rules[workload if workload in table.rules else DEFAULT_CLASS]
        for name in (*rule.candidates, table.pinned or NONE, table.fallback):
            if name in ready.pipelines and (candidate := table.candidates.get(name)):
                found[name] = Coding(
                    name=name,
                    pipeline=ready.pipelines[name],
                    ratio=candidate.ratio,
                    decode=candidate.decode,
                )
    unique = {coding.rate: coding for coding in found.values()}
    return tuple(sorted(unique.values(), key=lambda coding: (-coding.ratio, coding.name)))


def _preset(name: str) -> Coding:
    return Coding(name=name, pipeline=Pipeline.of(preset(name)))
