"""The trial log: JSON lines from which a run that was killed goes on.

The first line says what the trials were measured with, the second what screening found of the candidates; each further
line is one finished trial. A line cut short by a kill is dropped. Everything the result is made of is in the log, so
that a complete log gives the same result again, and all that decides what to measure next, so that a cut one goes on
alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Self

from kvserve_api.canonical import canonical_json
from kvserve_api.errors import ArtifactError
from kvserve_api.fields import Fields
from kvserve_api.latency import StageCost
from kvserve_api.quality import TaskScore
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.quality import Quality
from kvserve_profiler.screening import Screening

SCHEMA: Final = "kvserve.io/trials/v2"
MAX_ERROR: Final = 500


class Phase(StrEnum):
    """What a trial is for."""

    SEARCH = "search"
    """To find out where to look: on the windows of the search, as many of them as it took."""
    CONFIRM = "confirm"
    """For the result: on all windows that were held out, and with its costs."""
    TASK = "task"
    """For the result: the answers to a task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured of a strategy.

    Attributes:
        qualities: For each text, by digest, the quality.
        encode: Cost of encoding; None in a search, which needs no more than the screening's.
        decode: Cost of decoding, likewise.
        lossless: The decoded KV equals the native KV bit by bit, on every text.
        native_bytes: The transfer of a whole prefix, uncompressed, whose codec time counts.
        seen: Texts, by digest, that are too short for windows of their own: those of the search served again.
    """

    qualities: Mapping[str, Quality]
    encode: StageCost | None = None
    decode: StageCost | None = None
    lossless: bool
    native_bytes: int
    seen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as an object."""
        costs = (("encode", self.encode), ("decode", self.decode))
        value: dict[str, Any] = {
            "qualities": {text: quality.to_json() for text, quality in self.qualities.items()},
            "lossless": self.lossless,
            "native_bytes": self.native_bytes,
        }
        value |= {name: cost.to_json() for name, cost in costs if cost is not None}
        return value | ({"seen": list(self.seen)} if self.seen else {})

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a measurement."""
        qualities = fields.child("qualities")
        measurement = cls(
            qualities={
                text: Quality.from_json(qualities.child(text)) for text in qualities.mapping_of()
            },
            encode=_cost(fields, "encode"),
            decode=_cost(fields, "decode"),
            lossless=fields.boolean("lossless"),
            native_bytes=fields.integer("native_bytes", minimum=1),
            seen=tuple(map(str, fields.items("seen", []))),
        )
        fields.done()
        return measurement


def _cost(fields: Fields, key: str) -> StageCost | None:
    cost = StageCost.from_json(fields.child(key)) if fields.has(key) else None
    fields.ignore(key)
    return cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One finished trial.

    Attributes:
        name: The candidate's name.
        strategy: What was measured.
        phase: What for.
        duration_s: How long it took, in seconds, to the millisecond.
        measurement: What was measured; None if it failed, or answered a task.
        task: What tells the task that it answered from others, see `TaskSet.key`; empty for no task.
        score: How it answered; None if it failed, or answered no task.
        error: Why it failed; empty if it did not.
    """

    name: str
    strategy: StrategyConfig
    phase: Phase = Phase.SEARCH
    duration_s: float
    measurement: Measurement | None = None
    task: str = ""
    score: TaskScore | None = None
    error: str = ""

    def __post_init__(self) -> None:
        if (self.phase == Phase.TASK) != bool(self.task):
            raise ArtifactError("task", f"must be there if and only if the phase is {Phase.TASK}")
        found, other = (self.measurement, self.score)[:: -1 if self.task else 1]
        if other is not None or (found is None) != bool(self.error):
            raise ArtifactError("error", "must be there if and only if nothing was measured")
        object.__setattr__(self, "error", self.error[:MAX_ERROR])
        object.__setattr__(self, "duration_s", round(float(self.duration_s), 3))

    def to_json(self) -> dict[str, Any]:
        """Return the trial as an object."""
        value: dict[str, Any] = {
            "name": self.name,
            "strategy": self.strategy.to_json(),
            "phase": str(self.phase),
            "duration_s": self.duration_s,
        }
        value |= {"task": self.task} if self.task else {}
        for key, found in (("measurement", self.measurement), ("score", self.score)):
            if found is not None:
                return value | {key: found.to_json()}
        return value | {"error": self.error}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a trial."""
        trial = cls(
            name=fields.string("name", max_length=63),
            strategy=StrategyConfig.from_json(fields.mapping("strategy"), fields.at("strategy")),
            phase=Phase(fields.string("phase", choices=[*Phase])),
            duration_s=fields.number("duration_s", minimum=0),
            measurement=(
                Measurement.from_json(fields.child("measurement"))
                if fields.has("measurement")
                else None
            ),
            task=fields.string("task", ""),
            score=TaskScore.from_json(fields.child("score")) if fields.has("score") else None,
            error=fields.string("error", ""),
        )
        fields.ignore("measurement", "score")
        fields.done()
        return trial


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialLog:
    """The trials of a run so far.

    Attributes:
        basis: What they were measured with: model, texts, settings, device, versions. Other trials don't belong here.
        screening: What is known of the candidates; None before.
        trials: In the order in which they finished.
    """

    basis: Mapping[str, Any]
    screening: Screening | None = None
    trials: tuple[Trial, ...] = field(default=())

    def of(self, phase: Phase) -> tuple[Trial, ...]:
        """Return the trials of a phase."""
        return tuple(trial for trial in self.trials if trial.phase == phase)

    def searched(self, count: int) -> "TrialLog":
        """Return the log as it was after so many trials of the search."""
        return replace(self, trials=self.of(Phase.SEARCH)[:count])

    def measured(self, phase: Phase) -> frozenset[str]:
        """Return the digests of the strategies that need no further trial in a phase."""
        return frozenset(trial.strategy.digest for trial in self.of(phase))

    def answers(self) -> dict[tuple[str, str], TaskScore | None]:
        """Return the scores of strategies, by digest, on tasks, by key; None for one that could not answer."""
        return {(t.strategy.digest, t.task): t.score for t in self.of(Phase.TASK)}

    def plus(self, trial: Trial) -> "TrialLog":
        """Return the log with one more trial."""
        return replace(self, trials=(*self.trials, trial))

    def screened(self, screening: Screening) -> "TrialLog":
        """Return the log with what is known of the candidates."""
        return replace(self, screening=screening)

    def lines(self) -> list[str]:
        """Return the log as lines of JSON, each with its end of line."""
        objects: list[dict[str, Any]] = [
            {"schema": SCHEMA, "basis": dict(self.basis)},
            *([] if self.screening is None else [{"screening": self.screening.to_json()}]),
            *(trial.to_json() for trial in self.trials),
        ]
        return [canonical_json(value).decode() + "\n" for value in objects]

    def resume(self, text: str, *, but: str = "") -> "TrialLog":
        """Return this log with the trials of an earlier text of it.

        Args:
            text: What `lines` returned before, joined and possibly cut anywhere; empty for none.
            but: What of the basis may differ, because it is not known yet.

        Raises:
            ArtifactError: The text is no trial log, or its trials were measured with something else.
        """
        *lines, _cut = text.split("\n")
        if not lines:
            return self
        fields = _read(lines[0], "line 1")
        fields.string("schema", choices=[SCHEMA])
        basis = fields.mapping("basis")
        fields.done()
        mine = json.loads(canonical_json(dict(self.basis)))
        if basis != mine:
            keys = sorted(k for k in {*basis, *mine} - {but} if basis.get(k) != mine.get(k))
            if keys:
                raise ArtifactError(
                    "trials.jsonl",
                    f"holds trials of another run (different: {', '.join(keys)}): remove it to begin anew",
                )
        log = self
        for number, line in enumerate(lines[1:], start=2):
            fields = _read(line, f"line {number}")
            if number == 2 and fields.has("screening"):
                log = log.screened(Screening.from_json(fields.child("screening")))
                fields.done()
            else:
                log = log.plus(Trial.from_json(fields))
        return log


def basis_of(text: str) -> Mapping[str, Any]:
    """Return what the trials of a log were measured with; empty if the text is no log.

    Args:
        text: See `TrialLog.resume`.
    """
    try:
        return _read(text.split("\n", 1)[0], "line 1").mapping("basis", {})
    except ArtifactError:
        return {}


def _read(line: str, where: str) -> Fields:
    try:
        return Fields(json.loads(line), f"trials.jsonl {where}", error=ArtifactError)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"trials.jsonl {where}", f"is not JSON: {error}") from error
