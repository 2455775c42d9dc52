"""The connector's totals in vLLM's own log line and on its Prometheus page."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvserve_connector.metrics import COUNTS, ROW, Data, add_count, add_row


@dataclass
class Stats(KVConnectorStats):  # type: ignore[misc]
    """The totals of one interval, as vLLM carries them from worker to front end."""

    data: Data = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Tell whether anything was counted."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval, or another worker."""
        for key, row in other.data.get("rows", {}).items():
            add_row(self.data, key, row)
        for kind in COUNTS:
            for key, count in other.data.get(kind, {}).items():
                add_count(self.data, kind, key, count)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the log line says."""
        line: dict[str, int | float] = {}
        for key, row in sorted(self.data.get("rows", {}).items()):
            values = dict(zip(ROW, row, strict=True))
            line[f"{key} transfers"] = int(values["transfers"])
            line[f"{key} ratio"] = round(values["native_bytes"] / max(values["wire_bytes"], 1), 2)
            line[f"{key} avg s"] = round(values["total_s"] / max(values["transfers"], 1), 4)
        for key, count in sorted(self.data.get("failures", {}).items()):
            line[f"{key} failures"] = count
        for key, count in sorted(self.data.get("tokens", {}).items()):
            line[f"store {key} tokens"] = count
        for key, count in sorted(self.data.get("decisions", {}).items()):
            line[f"store {key}"] = count
        return line


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same totals as counters on vLLM's Prometheus page, ``vllm:kvserve_*``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = {
            name: self._counter(
                f"vllm:kvserve_{_prom_name(name)}", description, "direction", "profile"
            )
            for name, description in (
                ("transfers", "KV transfers that arrived whole."),
                ("native_bytes", "KV bytes transferred, before compression."),
                ("wire_bytes", "Bytes on the wire for them."),
                ("encode_s", "Seconds of encoding, summed."),
                ("wire_s", "Seconds in which chunks were arriving, summed."),
                ("decode_s", "Seconds of decoding, summed."),
                ("total_s", "Seconds from asking to having everything, summed."),
                ("exposed_s", "Seconds of these after the prefill's end, summed."),
            )
        }
        self._failures = self._counter(
            "vllm:kvserve_transfer_failures",
            "KV transfers that did not come about; the consumer recomputes.",
            "direction",
            "reason",
        )
        self._leases = self._counter(
            "vllm:kvserve_leases_ended",
            "Prefills whose blocks were kept for a consumer, by how that ended.",
            "reason",
        )
        self._counts = {
            "operations": self._counter(
                "vllm:kvserve_store_operations",
                "Operations of the KV store, by how they ended.",
                "operation",
                "outcome",
            ),
            "tokens": self._counter(
                "vllm:kvserve_store_tokens",
                "Prompt tokens looked for in the KV store (asked), found, loaded from it, saved in it.",
                "outcome",
            ),
            "decisions": self._counter(
                "vllm:kvserve_store_decisions",
                "Prefixes found in the KV store, by whether they were fetched or computed, and why.",
                "action",
                "reason",
            ),
            "transports": self._counter(
                "vllm:kvserve_transports",
                "KV transfers that arrived whole, by what carried their chunks.",
                "direction",
                "transport",
            ),
            "probes": self._counter(
                "vllm:kvserve_probe_bytes",
                "Bytes that were sent only to find out whether a link has become faster.",
                "direction",
            ),
        }
        self._opaque = self._gauge_cls(
            name="vllm:kvserve_opaque_cache",
            documentation="1 where the KV cache is carried as whole blocks, raw or lossless, or not at all.",
            labelnames=[*self._labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval's totals."""
        engine = self.per_engine_labelvalues[engine_idx]
        for key, row in transfer_stats_data.get("rows", {}).items():
            for name, value in zip(ROW, row, strict=True):
                self._rows[name].labels(*engine, *key.split(" ", 1)).inc(value)
        for key, count in transfer_stats_data.get("failures", {}).items():
            self._failures.labels(*engine, *key.split(" ", 1)).inc(count)
        for reason, count in transfer_stats_data.get("leases", {}).items():
            self._leases.labels(*engine, reason).inc(count)
        for kind, counts in self._counts.items():
            for key, count in transfer_stats_data.get(kind, {}).items():
                counts.labels(*engine, *key.split(" ", 1)).inc(count)
        for reason in transfer_stats_data.get("opaque", {}):
            self._opaque.labels(*engine, reason).set(1)

    def _counter(self, name: str, description: str, *labels: str) -> Any:
        return self._counter_cls(
            name=name, documentation=description, labelnames=[*self._labelnames, *labels]
        )


def _prom_name(name: str) -> str:
    """Return a total's name with Prometheus's unit suffix."""
    return f"{name[:-2]}_seconds" if name.endswith("_s") else name
