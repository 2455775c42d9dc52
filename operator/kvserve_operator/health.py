"""What the probes ask: does the operator still hear of changes, and does its lease loop still turn?

A watch that has gone silent is the failure that a restart heals. An API server that does not answer at all is not:
then the process stays alive and waits.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from kvserve_operator.lease import Leadership

SILENT_S: Final = 180.0
"""Three watch requests in a row without a sign of life."""
STUCK_S: Final = 60.0
UNREACHABLE_S: Final = 30.0


class Pulse:
    """Remembers each resource's last sign of life: an event, or a watch request that was answered."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = clock()
        self._beats: dict[str, float | None] | None = None

    def expect(self, resources: Iterable[str]) -> None:
        """Begin to listen for these resources."""
        self._started_s = self._clock()
        self._beats = dict.fromkeys(resources)

    def beat(self, resource: str) -> None:
        """Take note of a sign of life; other resources than the expected ones do not matter."""
        if self._beats is not None and resource in self._beats:
            self._beats[resource] = self._clock()

    def unheard(self) -> list[str]:
        """Return the resources that have not been heard of since the start."""
        if self._beats is None:
            return ["the CRD"]
        return [name for name, beat in self._beats.items() if beat is None]

    def silent_s(self) -> dict[str, float]:
        """Return for each resource how long it has been silent, in seconds."""
        now_s = self._clock()
        return {
            name: now_s - (self._started_s if beat is None else beat)
            for name, beat in (self._beats or {}).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """What health is judged by; all times in seconds before now.

    Attributes:
        silent_s: For each watched resource, how long it has been silent.
        unheard: Resources never heard of.
        lease_round_s: When the lease loop last began a round.
        api_answer_s: When the API server last answered the lease loop.
    """

    silent_s: dict[str, float]
    unheard: list[str]
    lease_round_s: float
    api_answer_s: float

    def sick(self) -> str:
        """Return why the process should be restarted, or an empty string."""
        if self.lease_round_s > STUCK_S:
            return f"the lease loop has not turned for {self.lease_round_s:.0f} s"
        silent = {name: s for name, s in self.silent_s.items() if s > SILENT_S}
        if silent and self.api_answer_s < UNREACHABLE_S:
            names = ", ".join(f"{name} for {s:.0f} s" for name, s in sorted(silent.items()))
            return f"the API server answers but these watches are silent: {names}"
        return ""

    def unready(self) -> str:
        """Return why the process can't do its work now, or an empty string."""
        if self.unheard:
            return f"not heard of yet: {', '.join(sorted(self.unheard))}"
        if self.api_answer_s > UNREACHABLE_S:
            return f"the API server has not answered for {self.api_answer_s:.0f} s"
        return self.sick()


def vitals(pulse: Pulse, leadership: Leadership) -> Vitals:
    """Take the vitals now."""
    now_s = time.monotonic()
    return Vitals(
        silent_s=pulse.silent_s(),
        unheard=pulse.unheard(),
        lease_round_s=now_s - leadership.last_tick_s,
        api_answer_s=now_s - leadership.last_answer_s,
    )


async def serve(address: str, take: Callable[[], Vitals]) -> web.AppRunner:
    """Serve ``/healthz`` and ``/readyz``.

    Args:
        address: ``host:port``.
        take: Returns the vitals.

    Returns:
        The server, to clean up at the end.
    """

    async def healthz(_: web.Request) -> web.Response:
        return _answer(take().sick())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(take().unready())

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    host, _, port = address.rpartition(":")
    await web.TCPSite(runner, host or "0.0.0.0", int(port)).start()
    return runner


def _answer(problem: str) -> web.Response:
    return web.Response(text=problem or "ok", status=503 if problem else 200)
