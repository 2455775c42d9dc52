"""Writes the controller's fields of each policy's status to the API server: on change only, and not too often."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.policy import API_VERSION, KIND, PLURAL
from kvserve_controller.activity import timestamp
from kvserve_controller.cluster import PREFIX
from kvserve_controller.kube_client import KubeClient
from kvserve_controller.program import Instant
from kvserve_controller.source import Snapshot
from kvserve_controller.status import OBJECTIVES_MET, PROGRAMMED, stamp

FIELD_MANAGER: Final = "kvserve-controller"
INTERVAL_S: Final = 2.0
"""Least seconds between two writes to one policy."""
NUMBERS_INTERVAL_S: Final = 10.0
"""The same where only observed times changed."""
MOST_BACKOFF_S: Final = 60.0

_OWN: Final = ("activeProfile", "objectives", "history")
_OWN_OF_TARGET: Final = ("role", "connected", "synced", "stale", "rejected", "message")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Written:
    """What the API server has of one policy's status, as far as it is ours."""

    uid: str
    status: dict[str, Any] = field(default_factory=dict)
    at_s: float = -math.inf
    backoff_s: float = 0.0


class StatusWriter:
    """Keeps the statuses of a cluster's policies up to date."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._written: dict[str, _Written] = {}

    def follow(self, snapshot: Snapshot) -> None:
        """Take up what policies there are, and what the status of a new one already says."""
        self._written = {
            key: known
            if (known := self._written.get(key)) is not None and known.uid == entry.uid
            else _Written(entry.uid, own(entry.status))
            for key, entry in snapshot.items()
        }

    async def write(self, statuses: Mapping[str, Mapping[str, Any]], now: Instant) -> int:
        """Write what has changed and may be written again; what fails is tried again later.

        Returns:
            How many requests were sent.
        """
        requests = 0
        for key, status in statuses.items():
            written = self._written.get(key)
            if written is None:
                continue
            new = stamp(status, written.status, timestamp(now.wall_s))
            interval_s = _interval_s(written.status, new)
            if interval_s is None or now.mono_s < written.at_s + written.backoff_s + interval_s:
                continue
            requests += 1
            written.at_s = now.mono_s
            await self._apply(key, written, new)
        return requests

    async def _apply(self, key: str, written: _Written, new: dict[str, Any]) -> None:
        namespace, _, name = key.partition("/")
        document = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"namespace": namespace, "name": name},
            "status": new,
        }
        try:
            await self._client.apply_status(PREFIX, PLURAL, document, manager=FIELD_MANAGER)
        except SpecError as error:
            # gone meanwhile, or a field the installed CRD doesn't know: not worth more than a rare retry
            written.backoff_s = MOST_BACKOFF_S
            log.warning("status refused", extra={"policy": key, "why": str(error)})
        except KVServeError as error:
            written.backoff_s = min(MOST_BACKOFF_S, max(INTERVAL_S, written.backoff_s * 2))
            log.warning("status not written", extra={"policy": key, "why": str(error)})
        else:
            written.status = new
            written.backoff_s = 0.0


def own(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the controller's fields of a policy's status."""
    value = {name: status[name] for name in _OWN if name in status}
    value["conditions"] = [
        condition
        for kind in (PROGRAMMED, OBJECTIVES_MET)
        for condition in status.get("conditions", [])
        if condition.get("type") == kind
    ]
    value["targets"] = [
        {name: target[name] for name in _OWN_OF_TARGET if name in target}
        for target in sorted(status.get("targets", []), key=lambda t: t.get("role") != "Prefill")
        if "connected" in target
    ]
    return value


def _interval_s(old: Mapping[str, Any], new: Mapping[str, Any]) -> float | None:
    """Return how many seconds after the last write a change may be written; None without a change."""
    if _comparable(old) == _comparable(new):
        return None
    if _without_numbers(old) == _without_numbers(new):
        return NUMBERS_INTERVAL_S
    return INTERVAL_S


def _comparable(status: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out empty lists: the API server doesn't keep what isn't there."""
    return {name: value for name, value in status.items() if value}


def _without_numbers(status: Mapping[str, Any]) -> dict[str, Any]:
    value = _comparable(status)
    value["objectives"] = [
        {name: item for name, item in objective.items() if name != "observedMilliseconds"}
        for objective in status.get("objectives", [])
    ]
    value["conditions"] = [
        {name: item for name, item in condition.items() if name != "message"}
        for condition in status.get("conditions", [])
    ]
    return value
