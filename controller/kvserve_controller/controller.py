"""The controller: policies and Pareto sets in, tables and status out. No I/O."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace

from kvserve_api import telemetry
from kvserve_api.table import Version
from kvserve_controller.activity import Cause
from kvserve_controller.checkpoint import Checkpoint, Saved
from kvserve_controller.learn import STAGES
from kvserve_controller.metrics import Metrics
from kvserve_controller.program import Instant, Program
from kvserve_controller.push import ACK_TIMEOUT_S, Hub
from kvserve_controller.session import Outcome
from kvserve_controller.source import Snapshot
from kvserve_controller.status import status
from kvserve_controller.versions import VersionClock

audit = logging.getLogger("kvserve.audit")
tracer = trace.get_tracer("kvserve.controller")


class Controller:
    """All policies and all pods.

    Attributes:
        hub: The streams and the tables in force.
        synced: The policies are known.
    """

    def __init__(
        self,
        *,
        prior_bytes_per_s: float,
        now: Callable[[], Instant],
        metrics: Metrics,
        ack_timeout_s: float = ACK_TIMEOUT_S,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Make a controller that knows no policy yet.

        Args:
            prior_bytes_per_s: Goodput to assume for a link nobody has measured yet.
            now: The clocks.
            metrics: What is counted.
            ack_timeout_s: How long a pod may take to answer a table.
            checkpoint: What an earlier controller had learned.
        """
        self.hub = Hub(
            on_answer=self._on_answer,
            on_behind=self._on_behind,
            on_settled=self._on_settled,
            ack_timeout_s=ack_timeout_s,
        )
        self.synced = False
        self._prior_bytes_per_s = prior_bytes_per_s
        self._now = now
        self._metrics = metrics
        self._versions = VersionClock(now().wall_s)
        self._programs: dict[str, tuple[str, Program]] = {}
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self._versions.raise_above(checkpoint.version)
        self._offered_s: dict[str, float] = {}

    def apply(self, snapshot: Snapshot) -> None:
        """Take up all policies and Pareto sets as their source has them now."""
        for key in [key for key, (uid, _) in self._programs.items() if _uid(snapshot, key) != uid]:
            del self._programs[key]
            self._offered_s.pop(key, None)
            self.hub.withdraw(key)
        causes: dict[str, Cause | None] = {}
        for key, entry in snapshot.items():
            if key not in self._programs:
                program = Program(
                    key,
                    prior_bytes_per_s=self._prior_bytes_per_s,
                    next_version=self._versions.next,
                )
                program.restore(entry.status, *self._saved(key))
                self._programs[key] = (entry.uid, program)
            program = self._programs[key][1]
            with tracer.start_as_current_span(
                telemetry.SPAN_COMPILE, attributes={telemetry.ATTR_POLICY: key}
            ):
                problem = program.problem
                causes[key] = program.load(entry, self._now())
                self._explain(program, causes[key])
                if program.problem is not None and str(program.problem) != str(problem):
                    _record("refused", program, problem=str(program.problem))
        by_age = sorted(snapshot, key=lambda key: (snapshot[key].created, key))
        self.hub.rematch(
            {key: policy for key in by_age if (policy := self._programs[key][1].policy) is not None}
        )
        # only now is it known which Decode pods the Prefill pods of a new table wait for
        for key, cause in causes.items():
            self._offer(self._programs[key][1], cause)
        self.synced = True

    def announce(self, version: Version) -> None:
        """Go above a version that a pod holds.

        Raises:
            SpecError: It can't be the version of a table.
        """
        self._versions.raise_above(version)

    def refused(self, reason: str) -> None:
        """Take note of a stream that was refused."""
        self._metrics.refused(reason)

    def reports(self, policy: str, pod: str, messages: Sequence[Any]) -> None:
        """Take up the ``TransferReport`` messages of one of a policy's pods."""
        _, program = self._programs.get(policy, ("", None))
        if program is not None:
            for outcome, count in program.observe(messages, self._now(), pod).items():
                self._metrics.reports(policy, outcome, count)

    def decided(self, policy: str, pod: str, messages: Sequence[Any]) -> None:
        """Take up the ``Decision`` messages of one of a policy's pods."""
        _, program = self._programs.get(policy, ("", None))
        if program is not None:
            refused = program.decisions.take(pod, messages)
            if refused:
                self._metrics.reports(policy, "BadDecision", refused)

    def decisions(self, policy: str, limit: int) -> list[dict[str, Any]] | None:
        """Return the latest decisions for a policy with their explanations, newest first; None for an unknown one."""
        _, program = self._programs.get(policy, ("", None))
        return None if program is None else program.decisions.explain(limit)

    def tick(self) -> None:
        """Follow the traffic; to be called about once a second."""
        for _, program in self._programs.values():
            self._publish(program, program.tick(self._now()))
        self._metrics.drifted(
            {key: len(program.drifted) for key, (_, program) in self._programs.items()}
        )
        self._metrics.streams(
            {key: self.hub.counts(key) for key in self._programs}, len(self.hub.sessions)
        )

    def checkpoint(self) -> Checkpoint:
        """Return what was learned, to survive this controller."""
        saved = {key: program.saved for key, (_, program) in self._programs.items()}
        return Checkpoint(
            self._now().wall_s,
            self._versions.last,
            {key: each for key, each in saved.items() if each is not None},
        )

    def statuses(self) -> dict[str, dict[str, Any]]:
        """Return what to publish about each policy, by key."""
        now_s = self._now().mono_s
        return {
            key: status(program, self.hub.counts(key), now_s)
            for key, (_, program) in self._programs.items()
        }

    def _saved(self, key: str) -> tuple[Saved | None, float]:
        """Return what an earlier controller had learned for a policy, and how many seconds ago."""
        if self._checkpoint is None:
            return None, 0.0
        gone_s = max(0.0, self._now().wall_s - self._checkpoint.wall_s)
        return self._checkpoint.policies.get(key), gone_s

    def _publish(self, program: Program, cause: Cause | None) -> None:
        self._explain(program, cause)
        self._offer(program, cause)

    def _offer(self, program: Program, cause: Cause | None) -> None:
        """Push a program's new table, if it has one."""
        if cause is not None and program.table is not None:
            program.decisions.offered(program.table)
            self._offered_s[program.key] = self._now().mono_s
            self.hub.offer(program.key, program.table, program.fingerprint)

    def _explain(self, program: Program, cause: Cause | None) -> None:
        """Record why there is a new table, if there is one."""
        if cause is None or program.table is None:
            return
        span = trace.get_current_span()
        span.set_attribute(telemetry.ATTR_TABLE_VERSION, str(program.table.version))
        span.set_attribute(telemetry.ATTR_REASON, cause.value)
        _record("compiled", program, cause=cause.value, **_inputs(program))

    def _on_answer(self, policy: str, outcome: Outcome) -> None:
        self._metrics.pushes(policy, outcome)

    def _on_settled(self, policy: str, version: Version, pods: int) -> None:
        _, program = self._programs.get(policy, ("", None))
        if program is not None:
            seconds = self._now().mono_s - self._offered_s[policy]
            _record("answered", program, version=str(version), pods=pods, seconds=round(seconds, 4))

    def _on_behind(self, policy: str) -> None:
        _, program = self._programs.get(policy, ("", None))
        if program is not None:
            self._publish(program, program.reissue())


def _uid(snapshot: Snapshot, key: str) -> str | None:
    return snapshot[key].uid if key in snapshot else None


def _record(event: str, program: Program, **details: Any) -> None:
    """Write one line of the audit log."""
    record = {"policy": program.key, "generation": program.generation, **details}
    audit.info(event, extra={"audit": record})


def _inputs(program: Program) -> dict[str, Any]:
    """Return what a table was compiled from and what came out."""
    table, pareto = program.table, program.pareto
    if table is None or pareto is None:
        return {}
    return {
        "version": str(table.version),
        "mode": table.mode.value,
        "pinned": table.pinned,
        "fallback": table.fallback,
        "pareto_digest": pareto.digest,
        "prior_bytes_per_s": table.prior_bytes_per_s,
        "rules": {
            name: {
                "goal": rule.goal.value,
                "candidates": list(rule.candidates),
                "deadline_s": rule.deadline_s if rule.deadline_s < math.inf else None,
                "margins": dict(rule.margins),
                "explore_share": rule.explore_share,
            }
            for name, rule in table.rules.items()
        },
        "corrections": {
            name: {
                stage: {"factor": getattr(c, stage), "doubt": getattr(c.doubt, stage)}
                for stage in STAGES
            }
            for name, c in program.learned.corrections.items()
            if name in table.candidates
        },
        "spread": {"bias": program.learned.spread.bias, "sd": program.learned.spread.sd},
        "leeways": {
            f"{name}/{objective.name}": share
            for (name, objective), share in program.learned.leeways.items()
        },
        "at_risk": sorted(program.learned.at_risk),
        "model_s": {
            f"{name}/p{percentile}": seen_s
            for (name, percentile), seen_s in program.learned.model_s.items()
        },
    }
