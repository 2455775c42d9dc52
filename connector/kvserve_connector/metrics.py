"""What the connector counts, over OpenTelemetry and as plain totals for vLLM's own pages."""

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from kvserve_api.otel import counter, histogram
from kvserve_api.selection import Selection
from kvserve_api.telemetry import (
    ATTR_BOUND,
    ATTR_DIRECTION,
    ATTR_OUTCOME,
    ATTR_PROFILE,
    ATTR_REASON,
    ATTR_STAGE,
    ATTR_VERB,
    CACHE_OPAQUE,
    CONTROL_FAILURES,
    LEASES,
    PROBE_BYTES,
    REPORTS_DROPPED,
    SELECTIONS,
    STORE_DECISIONS,
    STORE_OPERATIONS,
    STORE_TOKENS,
    TABLE_AGE,
    TRANSFER_FAILURES,
    TRANSFER_NATIVE_BYTES,
    TRANSFER_STAGE_DURATION,
    TRANSFER_WIRE_BYTES,
)
from kvserve_connector.outcome import Outcome
from kvserve_connector.replies import Part
from kvserve_connector.selector import Selector

ROW: Final = (
    "transfers",
    "native_bytes",
    "wire_bytes",
    "encode_s",
    "wire_s",
    "decode_s",
    "total_s",
    "exposed_s",
)
"""What is summed for each direction and profile, in this order."""

Data = dict[str, dict[str, Any]]
"""Totals as plain JSON: ``{"rows": {"direction profile": [as ROW]}, "failures": {"direction reason": count},
"leases": {how it ended: count}, "opaque": {why: 1}, "operations": {"get Hit": count},
"tokens": {what became of them: count}, "decisions": {"fetch why": count},
"transports": {"direction transport": count}, "probes": {"send": bytes}}``."""
COUNTS: Final = (
    "failures",
    "leases",
    "opaque",
    "operations",
    "tokens",
    "decisions",
    "transports",
    "probes",
)
"""What is counted beside the rows."""


def add_count(data: Data, kind: str, key: str, count: int = 1) -> None:
    """Add to one of the counts of totals."""
    counts = data.setdefault(kind, {})
    counts[key] = counts.get(key, 0) + count


def add_row(data: Data, key: str, row: list[float]) -> None:
    """Add to the row of one direction and profile."""
    rows = data.setdefault("rows", {})
    rows[key] = [a + b for a, b in zip(rows.get(key, [0] * len(row)), row, strict=True)]


class Metrics:
    """Counts what happens in one worker; safe from any thread.

    Args:
        selector: Whose table's age is shown.
    """

    def __init__(self, selector: Selector) -> None:
        meter = metrics.get_meter("kvserve.connector")
        self._native = counter(meter, TRANSFER_NATIVE_BYTES)
        self._wire = counter(meter, TRANSFER_WIRE_BYTES)
        self._probes = counter(meter, PROBE_BYTES)
        self._stages = histogram(meter, TRANSFER_STAGE_DURATION)
        self._failures = counter(meter, TRANSFER_FAILURES)
        self._selections = counter(meter, SELECTIONS)
        self._leases = counter(meter, LEASES)
        self._control = counter(meter, CONTROL_FAILURES)
        self._dropped = counter(meter, REPORTS_DROPPED)
        self._operations = counter(meter, STORE_OPERATIONS)
        self._tokens = counter(meter, STORE_TOKENS)
        self._decisions = counter(meter, STORE_DECISIONS)
        self._lock = threading.Lock()
        self._totals: Data = {}
        self._opaque = ""

        def age(_: CallbackOptions) -> Iterable[Observation]:
            yield Observation(selector.age_s)

        meter.create_observable_gauge(
            TABLE_AGE.name, [age], unit=TABLE_AGE.unit, description=TABLE_AGE.description
        )

        def opaque(_: CallbackOptions) -> Iterable[Observation]:
            if self._opaque:
                yield Observation(1, {ATTR_REASON: self._opaque})

        meter.create_observable_gauge(
            CACHE_OPAQUE.name,
            [opaque],
            unit=CACHE_OPAQUE.unit,
            description=CACHE_OPAQUE.description,
        )

    def opened(self, opaque: str) -> None:
        """Take note of why the cache is carried as whole blocks, or not at all."""
        self._opaque = opaque
        with self._lock:
            add_count(self._totals, "opaque", opaque)

    def take_totals(self) -> Data:
        """Return what was counted since the last call."""
        with self._lock:
            totals, self._totals = self._totals, {}
            return totals

    def selected(self, selection: Selection) -> None:
        """Count a choice."""
        self._selections.add(
            1, {ATTR_PROFILE: selection.profile, ATTR_BOUND: selection.bound.value}
        )

    def sent(self, parts: Mapping[str, Part], transport: str) -> None:
        """Count a transfer that was sent whole: as one of the first profile, bytes and seconds by what coded them."""
        for number, (profile, part) in enumerate(parts.items()):
            self._count(
                "send",
                profile,
                part.native_bytes,
                part.wire_bytes,
                {"encode": part.encode_s},
                transfers=0 if number else 1,
            )
        with self._lock:
            add_count(self._totals, "transports", f"send {transport}")

    def received(self, outcome: Outcome) -> None:
        """Count a transfer that ended here, well or badly; several profiles' times are split by native bytes."""
        if outcome.failure or outcome.accept is None:
            self.failed("receive", outcome.failure)
            return
        parts = outcome.parts
        self._split(
            "receive",
            {name: (part.native_bytes, part.wire_bytes) for name, part in parts.items()},
            {
                "wire": outcome.wire_s,
                "decode": outcome.decode_s,
                "total": outcome.total_s,
                "exposed": outcome.exposed_s,
            },
            # one transfer, of the profile that it began with
            counted={outcome.accept.profile} & parts.keys() or set(list(parts)[:1]),
        )
        with self._lock:
            add_count(self._totals, "transports", f"receive {outcome.transport}")

    def probed(self, padding_bytes: int) -> None:
        """Count bytes that were sent only to learn of a link."""
        if padding_bytes:
            self._probes.add(padding_bytes)
            with self._lock:
                add_count(self._totals, "probes", "send", padding_bytes)

    def failed(self, direction: str, reason: str) -> None:
        """Count a transfer that did not come about."""
        self._failures.add(1, {ATTR_DIRECTION: direction, ATTR_REASON: reason})
        with self._lock:
            add_count(self._totals, "failures", f"{direction} {reason}")

    def leases_ended(self, counts: dict[str, int]) -> None:
        """Count leases by how they ended."""
        for reason, count in counts.items():
            self._leases.add(count, {ATTR_REASON: reason})
            with self._lock:
                add_count(self._totals, "leases", reason, count)

    def control_failed(self, reason: str) -> None:
        """Count a stream to the controller that ended or did not come about."""
        self._control.add(1, {ATTR_REASON: reason})

    def reports_dropped(self, count: int) -> None:
        """Count transfer reports that found no room in their queue."""
        self._dropped.add(count)

    def store_operations(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Count what was asked of the KV store, by operation and how it ended."""
        for (operation, outcome), count in counts.items():
            self._operations.add(count, {ATTR_VERB: operation, ATTR_OUTCOME: outcome})
            with self._lock:
                add_count(self._totals, "operations", f"{operation} {outcome}", count)

    def store_tokens(self, outcome: str, count: int) -> None:
        """Count prompt tokens by what became of them."""
        if count:
            self._tokens.add(count, {ATTR_OUTCOME: outcome})
            with self._lock:
                add_count(self._totals, "tokens", outcome, count)

    def store_decided(self, fetch: bool, why: str) -> None:
        """Count a prefix that was found, by what is done."""
        action = "fetch" if fetch else "recompute"
        self._decisions.add(1, {ATTR_OUTCOME: action, ATTR_REASON: why})
        with self._lock:
            add_count(self._totals, "decisions", f"{action} {why}")

    def stored(
        self,
        direction: str,
        profiles: Mapping[str, tuple[int, int]],
        stages_s: Mapping[str, float],
        failure: str,
    ) -> None:
        """Count a prefix that was fetched from the KV store or saved in it, as far as that came.

        Args:
            direction: ``load`` or ``save``.
            profiles: For each profile native and stored bytes.
            stages_s: Seconds of each stage; they are split by native bytes.
            failure: Empty, or why the rest did not come about.
        """
        self._split(direction, profiles, stages_s)
        if failure:
            self.failed(direction, failure)

    def _split(
        self,
        direction: str,
        profiles: Mapping[str, tuple[int, int]],
        stages_s: Mapping[str, float],
        counted: Collection[str] | None = None,
    ) -> None:
        """Count by profile; a transfer of each, or only of those that are ``counted``."""
        total = sum(native_bytes for native_bytes, _ in profiles.values())
        for profile, (native_bytes, wire_bytes) in profiles.items():
            parts_s = {name: value * native_bytes / total for name, value in stages_s.items()}
            transfers = int(counted is None or profile in counted)
            self._count(direction, profile, native_bytes, wire_bytes, parts_s, transfers=transfers)

    def _count(
        self,
        direction: str,
        profile: str,
        native_bytes: int,
        wire_bytes: int,
        stages_s: dict[str, float],
        *,
        transfers: int,
    ) -> None:
        marks = {ATTR_DIRECTION: direction, ATTR_PROFILE: profile}
        self._native.add(native_bytes, marks)
        self._wire.add(wire_bytes, marks)
        for stage, seconds in stages_s.items():
            self._stages.record(seconds, {ATTR_STAGE: stage, ATTR_PROFILE: profile})
        times = [stages_s.get(name.removesuffix("_s"), 0.0) for name in ROW[3:]]
        with self._lock:
            add_row(
                self._totals,
                f"{direction} {profile}",
                [transfers, native_bytes, wire_bytes, *times],
            )
