"""Kubernetes events of policies, at most one a minute for each reason and policy.

What happens again within the minute is counted, and told with the count when the minute is over.
"""

import asyncio
import datetime
import logging
from dataclasses import dataclass, replace
from typing import Any, Final

from kvserve_api.canonical import digest, short_digest
from kvserve_api.errors import KVServeError
from kvserve_api.policy import API_VERSION, KIND
from kvserve_operator.client import JSON, MERGE, Client
from kvserve_operator.meta import Meta
from kvserve_operator.observed import PolicyFacts
from kvserve_operator.plan import Record

QUIET_S: Final = 60.0
FORGOTTEN_S: Final = 600.0
_TICK_S: Final = 5.0
_MAX_MESSAGE: Final = 1024
_MAX_SERIES: Final = 10_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Events of one reason and policy that are told as one.

    Attributes:
        meta: The policy.
        record: The latest.
        name: Name of the event object.
        first: When the first happened.
        told_s: When it was last told, in seconds of the caller's clock.
        count: How often it happened.
        untold: How many of these are not told yet.
    """

    meta: Meta
    record: Record
    name: str
    first: datetime.datetime
    told_s: float
    count: int = 1
    untold: int = 0


class EventLog:
    """Decides when to tell what; knows no clock and no API server."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], Series] = {}

    def add(
        self, meta: Meta, record: Record, now: datetime.datetime, now_s: float
    ) -> Series | None:
        """Take note of an event; return its series if it is to be told now."""
        key = (meta.uid, record.reason)
        series = self._series.get(key)
        if series is None or now_s - series.told_s >= FORGOTTEN_S:
            if len(self._series) >= _MAX_SERIES:
                self._series.pop(next(iter(self._series)))
            name = f"{meta.name}.{short_digest(digest([meta.uid, record.reason, now.isoformat()]))}"
            series = Series(meta=meta, record=record, name=name, first=now, told_s=now_s)
            self._series[key] = series
            return series
        series = replace(series, record=record, count=series.count + 1, untold=series.untold + 1)
        self._series[key] = series
        return self._tell(key, now_s) if now_s - series.told_s >= QUIET_S else None

    def due(self, now_s: float) -> list[Series]:
        """Return what happened and can be told now that a minute is over."""
        keys = [
            key
            for key, series in self._series.items()
            if series.untold and now_s - series.told_s >= QUIET_S
        ]
        return [self._tell(key, now_s) for key in keys]

    def _tell(self, key: tuple[str, str], now_s: float) -> Series:
        series = replace(self._series[key], told_s=now_s, untold=0)
        self._series[key] = series
        return series


class Recorder:
    """Writes events."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._log = EventLog()

    async def record(self, policy: PolicyFacts, record: Record) -> None:
        """Tell of an event, now or when its minute is over; a failure is logged and nothing else."""
        level = logging.WARNING if record.warning else logging.INFO
        meta = policy.meta
        logger.log(level, "%s/%s: %s: %s", meta.namespace, meta.name, record.reason, record.message)
        series = self._log.add(meta, record, _now(), asyncio.get_running_loop().time())
        if series:
            await self._write(series)

    async def run(self) -> None:
        """Tell what waited for its minute; never returns."""
        while True:
            await asyncio.sleep(_TICK_S)
            for series in self._log.due(asyncio.get_running_loop().time()):
                await self._write(series)

    async def _write(self, series: Series) -> None:
        base = f"/api/v1/namespaces/{series.meta.namespace}/events"
        body = event_manifest(series, _now())
        try:
            if series.count == 1:
                await self._client.write("POST", base, body, content_type=JSON, kind="Event")
            else:
                changed = {k: body[k] for k in ("count", "lastTimestamp", "message")}
                path = f"{base}/{series.name}"
                await self._client.write("PATCH", path, changed, content_type=MERGE, kind="Event")
        except KVServeError as error:
            # an event is news, not state: what it tells is in the conditions too
            logger.warning("event %s is lost: %s", series.name, error)


def event_manifest(series: Series, now: datetime.datetime) -> dict[str, Any]:
    """Return the event object of a series."""
    meta, record = series.meta, series.record
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": series.name, "namespace": meta.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "reason": record.reason,
        "message": record.message[:_MAX_MESSAGE],
        "type": "Warning" if record.warning else "Normal",
        "source": {"component": "kvserve-operator"},
        "reportingComponent": "kvserve.io/operator",
        "reportingInstance": "",
        "firstTimestamp": _rfc3339(series.first),
        "lastTimestamp": _rfc3339(now),
        "count": series.count,
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _rfc3339(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
