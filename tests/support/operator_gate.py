"""A gate between the operator and the API server: counts writes, answers with faults, and stops the operator.

It forwards to ``kubectl proxy`` and impersonates the operator's service account, so that the operator can do exactly
what that account may.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

Trap = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """A request that was not a read, and not about leases."""

    method: str
    path: str
    agent: str

    @property
    def kind(self) -> str:
        """What was written, like ``jobs`` or ``kvservepolicies/status``."""
        parts = self.path.split("/namespaces/")[1].split("/")
        return "/".join([parts[1], *parts[3:]])


@dataclass(slots=True)
class Gate:
    """A reverse proxy in a thread of its own.

    Attributes:
        upstream: Address of ``kubectl proxy``.
        user: Whom to impersonate.
        writes: The writes so far.
        trap: The number of the write that stops the operator, and whether before the API server gets it.
        on_trap: Stops the operator.
        faults: HTTP statuses to answer the next writes with, instead of asking the API server.
        cut: Answer nothing at all any more.
    """

    upstream: str
    user: str
    writes: list[Write] = field(default_factory=list)
    trap: tuple[int, bool] | None = None
    on_trap: Trap = lambda: None
    faults: list[int] = field(default_factory=list)
    cut: bool = False
    url: str = ""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen on a free port of loopback."""
        started = threading.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._serve(started)), daemon=True
        )
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        """Close everything."""

        def cancel() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)
        assert self._thread is not None
        self._thread.join(10)
        self._loop.close()

    def settle(self, *, quiet_s: float = 1.0, timeout_s: float = 20.0) -> None:
        """Wait until nothing has been written for a while."""
        deadline = time.monotonic() + timeout_s
        count, since = len(self.writes), time.monotonic()
        while time.monotonic() - since < quiet_s:
            assert time.monotonic() < deadline, "the operator goes on writing"
            time.sleep(0.05)
            if len(self.writes) != count:
                count, since = len(self.writes), time.monotonic()

    async def _serve(self, started: threading.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(request, session)

            application = web.Application(client_max_size=8 * 1024 * 1024)
            application.router.add_route("*", "/{path:.*}", handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            self.url = f"http://127.0.0.1:{port}"
            started.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await runner.cleanup()

    async def _handle(
        self, request: web.Request, session: aiohttp.ClientSession
    ) -> web.StreamResponse:
        if self.cut:
            await asyncio.Event().wait()
        write = request.method != "GET" and "/leases" not in request.path
        if write:
            agent = request.headers.get("User-Agent", "")
            self.writes.append(Write(method=request.method, path=request.path, agent=agent))
            if self.faults:
                return web.json_response({"message": "injected"}, status=self.faults.pop(0))
        trapped = write and self.trap is not None and self.trap[0] == len(self.writes)
        if trapped and self.trap and self.trap[1]:
            self.on_trap()
            return web.Response(status=500)
        response = await self._forward(request, session)
        if trapped:
            self.on_trap()
        return response

    async def _forward(
        self, request: web.Request, session: aiohttp.ClientSession
    ) -> web.StreamResponse:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in ("Content-Type", "Accept", "User-Agent")
        }
        headers["Impersonate-User"] = self.user
        async with session.request(
            request.method,
            f"{self.upstream}{request.rel_url}",
            headers=headers,
            data=await request.read() or None,
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            if "watch" not in request.query:
                body = await answer.read()
                return web.Response(
                    body=body, status=answer.status, content_type=answer.content_type
                )
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            return response
