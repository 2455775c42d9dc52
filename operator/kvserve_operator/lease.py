"""Leader election by a Lease: of several operators one writes, and one that can't renew stops in time.

Times of the lease itself are for people. Whether another holder is alive is judged by how long its lease has not
changed on this process's own monotonic clock, so that clocks need not agree.
"""

import asyncio
import datetime
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvserve_api.errors import KVServeError
from kvserve_operator.client import ApiError, Client

DURATION_S: Final = 15.0
"""How long others wait for a holder's sign of life."""
RENEW_DEADLINE_S: Final = 10.0
"""How long after its last renewal a holder may write."""
RETRY_S: Final = 2.0
NAME: Final = "kvserve-operator"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A lease as this process saw it.

    Attributes:
        holder: Who holds it, or empty.
        mark: Changes with each renewal.
        since_s: Since when it has been so, on this process's clock.
        duration_s: How long its holder may be silent.
    """

    holder: str
    mark: str
    since_s: float
    duration_s: float

    def free(self, now_s: float) -> bool:
        """Tell whether anybody may take it."""
        return not self.holder or now_s - self.since_s >= self.duration_s


class Leadership:
    """Competes for a Lease and tells whether this process holds it.

    Attributes:
        identity: This process, in the Lease.
        on_gain: Called when this process begins to lead.
        last_tick_s: When the loop last began a round, on the monotonic clock.
        last_answer_s: When the API server last answered it.
    """

    def __init__(
        self,
        client: Client,
        *,
        namespace: str,
        identity: str,
        on_gain: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self.last_tick_s = clock()
        self.last_answer_s = -RENEW_DEADLINE_S
        self._client = client
        self._base = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self.on_gain = on_gain
        self._clock = clock
        self._renewed_s: float | None = None
        self._seen: Seen | None = None

    def held(self) -> bool:
        """Tell whether this process may write now."""
        return self._renewed_s is not None and self._clock() - self._renewed_s < RENEW_DEADLINE_S

    async def run(self) -> None:
        """Compete for ever."""
        while True:
            await self.step()
            await asyncio.sleep(RETRY_S * random.uniform(0.9, 1.1))

    async def step(self) -> None:
        """Take, renew or watch the lease once."""
        began_s = self.last_tick_s = self._clock()
        led = self.held()
        try:
            mine = await self._compete(began_s)
            self.last_answer_s = self._clock()
        except KVServeError as error:
            logger.warning("lease: %s", error)
            return
        self._renewed_s = began_s if mine else None
        if mine and not led:
            logger.info("%s leads", self.identity)
            self.on_gain()
        elif led and not mine:
            logger.warning("%s does not lead any more", self.identity)

    async def release(self) -> None:
        """Give the lease up, so that another process need not wait for its end."""
        if not self.held():
            return
        self._renewed_s = None
        try:
            lease = await self._client.lease("GET", f"{self._base}/{NAME}")
            if lease["spec"].get("holderIdentity") == self.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._client.lease("PUT", f"{self._base}/{NAME}", lease)
        except KVServeError as error:
            logger.warning("lease: not released: %s", error)

    async def _compete(self, now_s: float) -> bool:
        try:
            lease = await self._client.lease("GET", f"{self._base}/{NAME}")
        except ApiError as error:
            if error.status != 404:
                raise
            return await self._write("POST", self._base, {"metadata": {"name": NAME}})
        seen = self._see(lease, now_s)
        if seen.holder != self.identity and not seen.free(now_s):
            return False
        return await self._write("PUT", f"{self._base}/{NAME}", lease)

    def _see(self, lease: dict[str, Any], now_s: float) -> Seen:
        spec = lease.get("spec") or {}
        mark = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen.mark != mark:
            self._seen = Seen(
                holder=spec.get("holderIdentity") or "",
                mark=mark,
                since_s=now_s,
                duration_s=float(spec.get("leaseDurationSeconds") or DURATION_S),
            )
        return self._seen

    async def _write(self, method: str, path: str, lease: dict[str, Any]) -> bool:
        """Write the lease as ours; the resource version in it makes the write fail if somebody else wrote."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(lease.get("spec") or {})
        if spec.get("holderIdentity") != self.identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(DURATION_S),
            "renewTime": now,
        }
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": lease["metadata"],
            "spec": spec,
        }
        try:
            await self._client.lease(method, path, body)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        return True
