"""What the controller knows of one policy: its inputs, the table compiled from them, and what came of it."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.latency import Link
from kvserve_api.policy import Metric, Mode, Objective, Policy
from kvserve_api.profile_set import DEFAULT_CLASS, NONE, ParetoSet, Profile
from kvserve_api.rpc.messages import MAX_MESSAGE_BYTES, push_from_table
from kvserve_api.selection import select
from kvserve_api.table import DecisionTable, Version
from kvserve_controller.activity import Activity, Cause
from kvserve_controller.checkpoint import Saved
from kvserve_controller.compile import REFERENCE_BYTES, Learned, compile_table, merge_classes
from kvserve_controller.forecast import Forecast
from kvserve_controller.learn import Drift, Learner, distance
from kvserve_controller.ledger import Ledger
from kvserve_controller.leeway import Leeway
from kvserve_controller.report import MAX_REPORTS, Report, ReportError
from kvserve_controller.source import Entry
from kvserve_controller.window import Window, measured_s

RELEARN_INTERVAL_S: Final = 5.0
"""Least seconds between two tables that differ only by what was learned."""
URGENT_INTERVAL_S: Final = 1.0
"""The same, if a correction has moved by more than `URGENT_CHANGE`."""
URGENT_CHANGE: Final = 0.3
RELEARN_CHANGE: Final = 0.1
"""Least relative change of a correction or deadline that is worth a new table."""
LEEWAY_CHANGE: Final = 0.03
"""Least change of a leeway that is worth one."""
COMFORT: Final = 0.9
"""An objective above this share of its threshold is at risk: its class tries nothing out."""


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment, on both clocks.

    Attributes:
        mono_s: Seconds on the monotonic clock; for durations.
        wall_s: Seconds since 1970; for people.
    """

    mono_s: float
    wall_s: float


class Program:
    """One policy with all that was derived from it.

    What can't be read or compiled never replaces what could: the last good table stays in force.

    Attributes:
        policy: The last policy that could be read.
        pareto: The last Pareto set that could be read.
        generation: Of the policy's spec, as its source has it now.
        table: The table in force.
        learned: What the table was compiled with.
        window: The recent transfers.
        activity: The profile in use.
        learned_from: How many transfers were compared with the set in force.
        decisions: The latest ones of its pods.
    """

    def __init__(self, key: str, *, prior_bytes_per_s: float, next_version: Callable[[], Version]):
        self.key = key
        self.policy: Policy | None = None
        self.pareto: ParetoSet | None = None
        self.generation = 1
        self._unreadable: SpecError | None = None
        self._uncompilable: SpecError | None = None
        self.table: DecisionTable | None = None
        self.learned = Learned(corrections={}, model_s={})
        self.window = Window([DEFAULT_CLASS])
        self.activity = Activity()
        self._profiles: Mapping[str, Profile] = {}
        self._learner = Learner()
        self._forecast = Forecast()
        self._leeways: dict[tuple[str, Objective], Leeway] = {}
        self.learned_from = 0
        self.decisions = Ledger()
        self._saved: Saved | None = None
        self._pareto_digest = ""
        self._prior_bytes_per_s = prior_bytes_per_s
        self._next_version = next_version
        self._compiled_s = -math.inf
        self._aged_s: float | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that was profiled; empty without a set."""
        return self.pareto.model.fingerprint if self.pareto is not None else ""

    @property
    def problem(self) -> SpecError | None:
        """Why the latest inputs are not in force; None if they are."""
        return self._unreadable or self._uncompilable

    def restore(
        self, status: Mapping[str, Any], saved: Saved | None = None, gone_s: float = 0.0
    ) -> None:
        """Take up what an earlier controller published, and what it had learned.

        Args:
            status: The policy's.
            saved: What was learned; used if the first Pareto set is the one it is about.
            gone_s: Seconds since then.
        """
        self.activity = Activity.restore({"history": status.get("history", [])})
        if saved is not None:
            saved.learner.age(gone_s)
            self._saved = saved

    @property
    def saved(self) -> Saved | None:
        """What was learned, for a checkpoint; None without a Pareto set."""
        if self.pareto is None:
            return None
        return Saved(self._pareto_digest, self._learner, self._forecast)

    @property
    def drifted(self) -> tuple[Drift, ...]:
        """What transfers have shown to be far from what was profiled, farthest first."""
        return self._learner.drifted(self._profiles)

    def load(self, entry: Entry, now: Instant) -> Cause | None:
        """Take up the policy and set as their source has them now.

        Returns:
            Why there is a new table; None if there is none.
        """
        policy = entry.policy if entry.policy is not None else self.policy
        pareto = entry.pareto if entry.pareto is not None else self.pareto
        new_policy, new_pareto = policy != self.policy, pareto != self.pareto
        self._unreadable = entry.problem
        self.generation = entry.generation
        if not (new_policy or new_pareto):
            return None
        cause = Cause.POLICY if new_policy else Cause.PROFILES
        self.policy = policy
        if policy is not None:
            self.window.keep_classes(policy.classes)
            self._leeways = {
                (name, objective): self._leeways.get((name, objective)) or Leeway()
                for name, workload in policy.classes.items()
                for objective in workload.slo.objectives
            }
        if new_pareto:
            self.pareto = pareto
            self._pareto_digest = pareto.digest if pareto is not None else ""
            self._learner, self._forecast = Learner(), Forecast()
            self.learned_from = 0
            saved, self._saved = self._saved, None
            if saved is not None and saved.pareto_digest == self._pareto_digest:
                self._learner, self._forecast = saved.learner, saved.forecast
        return self._compile(Cause.STARTED if self.table is None else cause, now)

    def observe(self, messages: Sequence[Any], now: Instant, consumer: str = "") -> Counter[str]:
        """Take up the ``TransferReport`` messages of a pod.

        Args:
            messages: What it reported.
            now: The time.
            consumer: The pod.

        Returns:
            How many were learned from (``Learned``) and how many were not, by reason; ``Mixed`` are those that count
            for objectives only, because several profiles coded them.
        """
        outcomes: Counter[str] = Counter()
        if len(messages) > MAX_REPORTS:
            outcomes["TooMany"] = len(messages) - MAX_REPORTS
        for message in messages[:MAX_REPORTS]:
            try:
                outcomes[self._observe(Report.read(message), now, consumer)] += 1
            except ReportError as error:
                outcomes[error.reason] += 1
        return outcomes

    def tick(self, now: Instant) -> Cause | None:
        """Follow the traffic: the profile in use, and a new table if enough was learned.

        Returns:
            Why there is a new table; None if there is none.
        """
        if self._aged_s is not None:
            self._learner.age(now.mono_s - self._aged_s)
        self._aged_s = now.mono_s
        if self.table is None:
            return None
        self._follow(self.table, now)
        if now.mono_s >= self._compiled_s + RELEARN_INTERVAL_S:
            moved = self._moved(now)
        elif now.mono_s >= self._compiled_s + URGENT_INTERVAL_S:
            corrections = self._learner.corrections(self._profiles)
            moved = distance(self.learned.corrections, corrections) > URGENT_CHANGE
        else:
            moved = False
        return self._compile(Cause.LEARNED, now) if moved else None

    def reissue(self) -> Cause | None:
        """Give the table in force a new version, because a pod holds a higher one."""
        if self.table is None:
            return None
        self.table = replace(self.table, version=self._next_version())
        return Cause.REISSUED

    def _observe(self, report: Report, now: Instant, consumer: str) -> str:
        """Take up a report; return what it was good for."""
        profile = self._profiles.get(report.profile)
        if profile is None:
            raise ReportError("UnknownProfile", "profile", f"is unknown: {report.profile!r}")
        self.window.add(report, now.mono_s)
        self._judge(report)
        self.activity.observe_goodput(report.goodput_bytes_per_s)
        if report.shares:
            # which profile took how much of it nobody knows, and what was predicted was not what was done
            return "Mixed"
        self._learner.observe(profile, report, consumer)
        self.learned_from += 1
        self._forecast.add(report.total_s, report.predicted_s)
        return "Learned"

    def _judge(self, report: Report) -> None:
        """Hold a transfer that was chosen by margins against its class's objectives."""
        if self.policy is None or self.policy.control.mode is not Mode.ACTIVE:
            return
        workload = report.workload if report.workload in self.policy.classes else DEFAULT_CLASS
        for (name, objective), leeway in self._leeways.items():
            if name == workload:
                taken_s = measured_s(report, objective.metric)
                leeway.add(objective, late=taken_s * 1000 > objective.threshold_ms)

    def _learned(self, now: Instant, profiles: Iterable[str]) -> Learned:
        model_s = {}
        for name, workload in self.policy.classes.items() if self.policy else ():
            for objective in workload.slo.objectives:
                if objective.metric is Metric.TIME_TO_FIRST_TOKEN:
                    key = (name, objective.percentile)
                    seen_s = self.window.percentile_s(name, None, key[1], now.mono_s)
                    # without traffic for a while, what was seen before is still the best guess
                    seen_s = self.learned.model_s.get(key) if seen_s is None else seen_s
                    if seen_s is not None:
                        model_s[key] = seen_s
        return Learned(
            corrections=self._learner.corrections(profiles),
            model_s=model_s,
            spread=self._forecast.spread,
            leeways={key: leeway.share for key, leeway in self._leeways.items()},
            at_risk=self._at_risk(now),
            native_bytes=self.window.native_bytes() or REFERENCE_BYTES,
            bytes_per_s=self.window.goodput_bytes_per_s(now.mono_s) or 0.0,
        )

    def _at_risk(self, now: Instant) -> frozenset[str]:
        """Return the workload classes with an objective that is broken, or nearly."""
        return frozenset(
            name
            for name, workload in (self.policy.classes.items() if self.policy else ())
            for objective in workload.slo.objectives
            if (
                self.window.percentile_s(name, objective.metric, objective.percentile, now.mono_s)
                or 0.0
            )
            * 1000
            > COMFORT * objective.threshold_ms
        )

    def _moved(self, now: Instant) -> bool:
        new = self._learned(now, self._profiles)
        if distance(self.learned.corrections, new.corrections) > RELEARN_CHANGE:
            return True
        if new.at_risk != self.learned.at_risk:
            return True
        asked = (
            any(w.slo.objectives for w in self.policy.classes.values()) if self.policy else False
        )
        old, spread = self.learned.spread, new.spread
        # what a percentile adds to the mean moves with both
        if asked and abs(spread.bias - old.bias) + 2 * abs(spread.sd - old.sd) > RELEARN_CHANGE:
            return True
        if any(
            abs(share - self.learned.leeways.get(key, 0.0)) > LEEWAY_CHANGE
            for key, share in new.leeways.items()
        ):
            return True
        old_s = self.learned.model_s
        return any(
            key not in old_s or abs(seen_s - old_s[key]) > RELEARN_CHANGE * old_s[key]
            for key, seen_s in new.model_s.items()
        )

    def _compile(self, cause: Cause, now: Instant) -> Cause | None:
        """Compile the inputs; an unusable one leaves the table as it is and says why."""
        if self.policy is None or self.pareto is None:
            return None
        self._compiled_s = now.mono_s
        try:
            profiles = merge_classes(self.policy, self.pareto)
            learned = self._learned(now, profiles)
            table = compile_table(
                self.policy,
                self.pareto,
                version=self.table.version if self.table else Version(epoch=0, counter=0),
                prior_bytes_per_s=self._prior_bytes_per_s,
                learned=learned,
            )
            _check_size(table)
        except SpecError as error:
            self._uncompilable = error
            return None
        self._uncompilable = None
        self.learned = learned
        self._profiles = profiles
        if table == self.table:
            return None
        self.table = replace(table, version=self._next_version())
        self.activity.compiled(cause)
        self._follow(self.table, now)
        return cause

    def _follow(self, table: DecisionTable, now: Instant) -> None:
        goodput = self.window.goodput_bytes_per_s(now.mono_s) or self._prior_bytes_per_s
        expected = select(
            table,
            DEFAULT_CLASS,
            native_bytes=self.window.native_bytes() or REFERENCE_BYTES,
            link=Link(bytes_per_s=goodput),
        )
        self.activity.update(
            self.window.usage(now.mono_s),
            possible=_possible(table),
            predicted=expected.profile,
            goodput_bytes_per_s=goodput,
            version=table.version,
            settled=self.window.settled(table.version, now.mono_s),
            wall_s=now.wall_s,
        )


def _check_size(table: DecisionTable) -> None:
    size = push_from_table(table, "").ByteSize()
    if size > MAX_MESSAGE_BYTES // 2:
        raise ArtifactError(
            "classes",
            f"make a table of {size} bytes, too large to push: use fewer workload classes",
        )


def _possible(table: DecisionTable) -> frozenset[str]:
    """Return the profiles that transfers can use under a table."""
    if table.pinned is not None:
        return frozenset({table.pinned})
    if table.mode is not Mode.ACTIVE:
        return frozenset({NONE})
    return frozenset(name for rule in table.rules.values() for name in rule.candidates)
