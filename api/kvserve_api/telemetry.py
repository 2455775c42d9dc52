"""Names, units and descriptions of every span, metric and attribute KVServe emits.

OpenTelemetry has no convention for KV-cache transfers, so ours live below ``kvserve.``.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Instrument:
    """A metric: its name, its unit (UCUM) and what it counts."""

    name: str
    unit: str
    description: str


# Spans: a transfer's are children of the request's own trace where the client sent one.
SPAN_PREFILL: Final = "kvserve.prefill"
SPAN_TRANSFER: Final = "kvserve.transfer"
SPAN_ENCODE: Final = "kvserve.encode"
SPAN_WIRE: Final = "kvserve.wire"
SPAN_DECODE: Final = "kvserve.decode"
SPAN_STORE_LOOKUP: Final = "kvserve.store.lookup"
SPAN_STORE_LOAD: Final = "kvserve.store.load"
SPAN_STORE_SAVE: Final = "kvserve.store.save"
SPAN_PROFILE_RUN: Final = "kvserve.profile.run"
SPAN_PROFILE_TRIAL: Final = "kvserve.profile.trial"
SPAN_COMPILE: Final = "kvserve.controller.compile"
SPAN_RECONCILE: Final = "kvserve.operator.reconcile"

# Attributes.
ATTR_POLICY: Final = "kvserve.policy"
ATTR_PROFILE: Final = "kvserve.profile"
ATTR_WORKLOAD: Final = "kvserve.workload"
ATTR_TABLE_VERSION: Final = "kvserve.table.version"
ATTR_BOUND: Final = "kvserve.selection.bound"
ATTR_REASON: Final = "kvserve.reason"
ATTR_OUTCOME: Final = "kvserve.outcome"
ATTR_DIRECTION: Final = "kvserve.direction"
ATTR_STAGE: Final = "kvserve.stage"
ATTR_KIND: Final = "kvserve.kind"
ATTR_VERB: Final = "kvserve.verb"
ATTR_NATIVE_BYTES: Final = "kvserve.native_bytes"
ATTR_WIRE_BYTES: Final = "kvserve.wire_bytes"
ATTR_TOKENS: Final = "kvserve.tokens"

# Metrics of the connector.
TRANSFER_NATIVE_BYTES: Final = Instrument(
    name="kvserve.transfer.native_bytes",
    unit="By",
    description="KV-cache bytes transferred, before compression, by profile and direction.",
)
TRANSFER_WIRE_BYTES: Final = Instrument(
    name="kvserve.transfer.wire_bytes",
    unit="By",
    description="Bytes on the wire, headers and checksums included, by profile and direction.",
)
PROBE_BYTES: Final = Instrument(
    name="kvserve.link.probe_bytes",
    unit="By",
    description="Bytes that were sent only to find out whether a link has become faster.",
)
TRANSFER_STAGE_DURATION: Final = Instrument(
    name="kvserve.transfer.stage.duration",
    unit="s",
    description="Time of each stage of a transfer (encode, wire, decode, total, exposed), by profile.",
)
TRANSFER_FAILURES: Final = Instrument(
    name="kvserve.transfer.failures",
    unit="{transfer}",
    description="Transfers that were recomputed instead, by reason.",
)
SELECTIONS: Final = Instrument(
    name="kvserve.selections",
    unit="{transfer}",
    description="Profiles chosen, by profile and by what decided.",
)
TABLE_AGE: Final = Instrument(
    name="kvserve.table.age",
    unit="s",
    description="Seconds since the controller was last heard of.",
)

CACHE_OPAQUE: Final = Instrument(
    name="kvserve.cache.opaque",
    unit="1",
    description="1 where a pod's KV cache is carried as whole blocks, raw or lossless, or not at all; by reason.",
)
LEASES: Final = Instrument(
    name="kvserve.leases",
    unit="{lease}",
    description="Prefills whose blocks were kept for a consumer, by how that ended.",
)
STORE_OPERATIONS: Final = Instrument(
    name="kvserve.store.operations",
    unit="{operation}",
    description="Operations of the KV store, by operation (get, put, exists, delete) and by how they ended.",
)
STORE_TOKENS: Final = Instrument(
    name="kvserve.store.tokens",
    unit="{token}",
    description="Prompt tokens by what became of them: looked for, found, fetched from the KV store, or stored in it.",
)
STORE_DECISIONS: Final = Instrument(
    name="kvserve.store.decisions",
    unit="{request}",
    description="Prefixes found in the KV store, by what was done (fetch, recompute) and why.",
)
REPORTS_DROPPED: Final = Instrument(
    name="kvserve.reports.dropped",
    unit="{report}",
    description="Transfer reports that no controller was there to take.",
)
CONTROL_FAILURES: Final = Instrument(
    name="kvserve.control.failures",
    unit="{stream}",
    description="Streams to the controller that ended or did not come about, by reason.",
)

# Metrics of the controller.
CONTROLLER_STREAMS: Final = Instrument(
    name="kvserve.controller.streams",
    unit="{stream}",
    description="Connected pods, by policy and state (synced, pending, rejected).",
)
CONTROLLER_REFUSED: Final = Instrument(
    name="kvserve.controller.refused",
    unit="{stream}",
    description="Streams of pods that were refused, by reason.",
)
CONTROLLER_PUSHES: Final = Instrument(
    name="kvserve.controller.pushes",
    unit="{table}",
    description="Tables pushed, by policy and outcome (ack, nack, timeout).",
)
CONTROLLER_REPORTS: Final = Instrument(
    name="kvserve.controller.reports",
    unit="{report}",
    description="Transfer reports received, by policy and whether they were learned from, or why not.",
)

CONTROLLER_DRIFTED: Final = Instrument(
    name="kvserve.controller.drifted",
    unit="{stage}",
    description="Stages of profiles that transfers showed to be far from what was profiled, by policy.",
)
CONTROLLER_CHECKPOINTS: Final = Instrument(
    name="kvserve.controller.checkpoints",
    unit="{checkpoint}",
    description="Checkpoints of what was learned, by outcome (written, restored, absent, or why it was refused).",
)

# Metrics of the operator.
RECONCILES: Final = Instrument(
    name="kvserve.operator.reconciles",
    unit="{reconcile}",
    description="Reconciliations, by outcome.",
)
OPERATOR_WRITES: Final = Instrument(
    name="kvserve.operator.writes",
    unit="{request}",
    description="Writes to the API server, by kind and verb.",
)

# Metrics of the profiler.
PROFILE_TRIALS: Final = Instrument(
    name="kvserve.profile.trials",
    unit="{trial}",
    description="Strategies measured, in the search and again to confirm, by outcome.",
)
