"""Pods that measure together: what one hands out to the others, and what comes back.

One of them, index 0, decides: it screens, suggests, confirms, and writes log and result. The others measure what it
hands out and know nothing else. They talk by three kinds of keys of the run's ConfigMap, which every cluster has:
the log, the work that is offered, and each helper's results. A merge patch changes the keys that it names only, so
nobody overwrites another.

What is measured depends on the log of when a batch began and not on who measures, so any pod may be killed at any time:
index 0 takes over what nobody brings, and finds in the log, and in the helpers' keys, what was brought before.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from kvserve_api.canonical import canonical_json
from kvserve_api.errors import ArtifactError
from kvserve_api.fields import Fields
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.trials import Phase, Trial, TrialLog

SCHEMA = "kvserve.io/work/v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing to measure.

    Attributes:
        phase: What for.
        name: The candidate's name.
        strategy: What to measure.
        task: The task to answer, see `TaskSet.key`; empty in a search.
    """

    phase: Phase
    name: str
    strategy: StrategyConfig
    task: str = ""

    def is_of(self, trial: Trial) -> bool:
        """Tell whether a trial is the result."""
        return (self.phase, self.strategy.digest, self.task) == (
            trial.phase,
            trial.strategy.digest,
            trial.task,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the item as an object."""
        return {
            "phase": str(self.phase),
            "name": self.name,
            "strategy": self.strategy.to_json(),
            "task": self.task,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read an item."""
        item = cls(
            phase=Phase(fields.string("phase", choices=[*Phase])),
            name=fields.string("name", max_length=63),
            strategy=StrategyConfig.from_json(fields.mapping("strategy"), fields.at("strategy")),
            task=fields.string("task", ""),
        )
        fields.done()
        return item


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is offered.

    Attributes:
        searched: Trials of the search that were known when it was decided; the others must not influence it.
        items: What to measure; helper i takes every i-th of as many as there are pods.
        done: There will be no more.
    """

    searched: int = 0
    items: tuple[Item, ...] = ()
    done: bool = False

    def document(self) -> str:
        """Return the canonical JSON."""
        value = {
            "schema": SCHEMA,
            "searched": self.searched,
            "items": [item.to_json() for item in self.items],
            "done": self.done,
        }
        return canonical_json(value).decode()

    @classmethod
    def parse(cls, document: str) -> Self:
        """Read what is offered; nothing, for an empty document.

        Raises:
            ArtifactError: It is not what `document` returns.
        """
        if not document:
            return cls()
        fields = _fields(document, "work")
        fields.string("schema", choices=[SCHEMA])
        work = cls(
            searched=fields.integer("searched", minimum=0),
            items=tuple(Item.from_json(item) for item in fields.children("items")),
            done=fields.boolean("done"),
        )
        fields.done()
        return work

    def share(self, index: int, pods: int) -> tuple[Item, ...]:
        """Return what a pod of so many is to measure."""
        return self.items[index::pods]


class Crew(Protocol):
    """The other pods, as the deciding one sees them."""

    @property
    def pods(self) -> int:
        """How many pods there are to be, the deciding one included."""
        ...

    @property
    def present(self) -> Collection[int]:
        """Indices of the helpers that are worth waiting for."""
        ...

    def give_up(self, index: int) -> None:
        """Wait for a helper no more, until it brings something."""
        ...

    def offer(self, log: TrialLog, work: Work) -> None:
        """Hand out work; the log must be known first."""
        ...

    def found(self) -> list[Trial]:
        """Return what helpers have brought of late."""
        ...


class Alone:
    """No other pods."""

    pods = 1
    present: Collection[int] = ()

    def give_up(self, index: int) -> None:
        """There is nobody to wait for."""

    def offer(self, log: TrialLog, work: Work) -> None:
        """Hand out nothing."""

    def found(self) -> list[Trial]:
        """Return nothing."""
        return []


def write_results(trials: Sequence[Trial]) -> str:
    """Return what a helper brings."""
    return canonical_json([trial.to_json() for trial in trials]).decode()


def read_results(document: str) -> list[Trial]:
    """Return what a helper has brought.

    Raises:
        ArtifactError: It is not what `write_results` returns.
    """
    if not document:
        return []
    fields = _fields(f'{{"trials":{document}}}', "results")
    return [Trial.from_json(item) for item in fields.children("trials")]


def _fields(document: str, name: str) -> Fields:
    try:
        return Fields(json.loads(document), name, error=ArtifactError)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(name, f"is not JSON: {error}") from error
