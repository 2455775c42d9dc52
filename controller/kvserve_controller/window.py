"""The recent transfers of one policy: bounded, and a pure function of the times passed in."""

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvserve_api.policy import Metric
from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_api.table import Version
from kvserve_controller.report import Report

WINDOW_S: Final = 300.0
"""How far back objectives are judged."""
MAX_TRANSFERS: Final = 2048
"""Most transfers remembered of a workload class."""
USAGE_S: Final = 10.0
"""The profile in use is the one most transfers used within this time …"""
USAGE_TRANSFERS: Final = 5
"""… or, where traffic is thin, among so many last ones."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer and when its report came, on a monotonic clock in seconds."""

    at_s: float
    report: Report


class Window:
    """The recent transfers, by workload class."""

    def __init__(self, classes: Iterable[str]) -> None:
        self._classes: dict[str, deque[Transfer]] = {
            name: deque(maxlen=MAX_TRANSFERS) for name in classes
        }
        self._last: deque[Transfer] = deque(maxlen=MAX_TRANSFERS)

    def keep_classes(self, classes: Iterable[str]) -> None:
        """Follow a change of the policy's workload classes."""
        self._classes = {
            name: self._classes.get(name, deque(maxlen=MAX_TRANSFERS)) for name in classes
        }

    def add(self, report: Report, now_s: float) -> None:
        """Remember a transfer; one of an unknown class counts as ``default``."""
        transfer = Transfer(now_s, report)
        self._classes.get(report.workload, self._classes[DEFAULT_CLASS]).append(transfer)
        self._last.append(transfer)

    def percentile_s(
        self, workload_class: str, metric: Metric | None, percentile: int, now_s: float
    ) -> float | None:
        """Return a percentile by the nearest-rank method, in seconds; None without transfers.

        Args:
            workload_class: Whose transfers.
            metric: What of them; None for the model's own time.
            percentile: 1 to 100.
            now_s: The time on the clock of `add`.
        """
        values = sorted(
            measured_s(transfer.report, metric)
            for transfer in self._classes.get(workload_class, ())
            if transfer.at_s > now_s - WINDOW_S
        )
        if not values:
            return None
        return values[math.ceil(len(values) * percentile / 100) - 1]

    def usage(self, now_s: float) -> Counter[str]:
        """Return how often each profile was used lately."""
        return Counter(transfer.report.profile for transfer in self._recent(now_s))

    def settled(self, version: Version, now_s: float) -> bool:
        """Tell whether all recent transfers were decided by one table; true without any."""
        return all(transfer.report.version == version for transfer in self._recent(now_s))

    def goodput_bytes_per_s(self, now_s: float) -> float | None:
        """Return the median goodput of the links lately; None if nobody reported one."""
        values = sorted(
            transfer.report.goodput_bytes_per_s
            for transfer in self._recent(now_s)
            if transfer.report.goodput_bytes_per_s > 0
        )
        return values[len(values) // 2] if values else None

    def native_bytes(self) -> int | None:
        """Return the median size of the transfers, in native bytes; None without any."""
        values = sorted(transfer.report.native_bytes for transfer in self._last)
        return values[len(values) // 2] if values else None

    def _recent(self, now_s: float) -> list[Transfer]:
        """Return the transfers of the last seconds, or the last few of the whole window."""
        recent: list[Transfer] = []
        for transfer in reversed(self._last):
            limit_s = USAGE_S if len(recent) >= USAGE_TRANSFERS else WINDOW_S
            if transfer.at_s <= now_s - limit_s:
                break
            recent.append(transfer)
        return recent


def measured_s(report: Report, metric: Metric | None) -> float:
    """Return what an objective's metric is of a transfer, in seconds; without a metric the model's own time."""
    match metric:
        case None:
            return report.model_s
        case Metric.KV_TRANSFER_TIME:
            return report.exposed_s
        case Metric.TIME_TO_FIRST_TOKEN:
            # what was transferred while the prefill went on is part of the model's time already
            return report.model_s + report.exposed_s
