"""Liveness, readiness and status over HTTP."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

MOST_TICK_S: Final = 15.0
"""A decision loop that has not turned for so long is stuck."""
MOST_SILENCE_S: Final = 180.0
"""A source that has neither brought nor tried anything for so long is stalled."""
MAX_LIMIT: Final = 256


@dataclass(slots=True)
class Health:
    """What the probes ask for.

    Attributes:
        ticked_s: When the decision loop last turned, on the monotonic clock.
        source_s: Returns when the source was last alive, on the same clock.
        synced: Returns whether the policies are known.
        listening: Pods can connect.
    """

    ticked_s: float
    source_s: Callable[[], float]
    synced: Callable[[], bool]
    listening: bool = False

    def dead(self, now_s: float) -> str:
        """Return why the process should be restarted; empty while it lives."""
        if now_s - self.ticked_s > MOST_TICK_S:
            return f"the decision loop has not turned for {now_s - self.ticked_s:.0f} s"
        silence_s = now_s - self.source_s()
        if silence_s > MOST_SILENCE_S:
            return f"the source of policies has been silent for {silence_s:.0f} s"
        return ""

    def unready(self) -> str:
        """Return why pods should not be sent here; empty when they should."""
        if not self.synced():
            return "the policies are not read yet"
        return "" if self.listening else "not listening"


def application(
    health: Health,
    statuses: Callable[[], dict[str, dict[str, Any]]],
    decisions: Callable[[str, int], list[dict[str, Any]] | None] = lambda _policy, _limit: None,
) -> web.Application:
    """Return the HTTP application.

    It answers ``/healthz``, ``/readyz``, ``/status`` with every policy's status as JSON, and
    ``/decisions?policy=NAMESPACE/NAME&limit=N`` with the latest decisions for a policy, explained.

    Args:
        health: What the probes ask for.
        statuses: Returns every policy's status, by key.
        decisions: Returns the latest decisions for a policy, at most so many; None for an unknown policy.
    """

    async def healthz(_request: web.Request) -> web.Response:
        return _answer(health.dead(time.monotonic()))

    async def readyz(_request: web.Request) -> web.Response:
        return _answer(health.unready())

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(statuses())

    async def decided(request: web.Request) -> web.Response:
        limit = request.query.get("limit", "20")
        if not (limit.isdecimal() and 1 <= int(limit) <= MAX_LIMIT):
            return web.Response(text=f"limit must be 1 to {MAX_LIMIT}", status=400)
        found = decisions(request.query.get("policy", ""), int(limit))
        if found is None:
            return web.Response(text="no such policy; /status lists them", status=404)
        return web.json_response(found)

    app = web.Application()
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/status", status),
            web.get("/decisions", decided),
        ]
    )
    return app


def _answer(problem: str) -> web.Response:
    return web.Response(text=problem or "ok", status=503 if problem else 200)
