"""The operator process: what runs beside each other, how it starts and how it ends."""

import asyncio
import logging
import os
import signal
import socket
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final

import kopf

from kvserve_api.errors import UnavailableError
from kvserve_api.policy import GROUP, PLURAL
from kvserve_operator import handlers, health
from kvserve_operator.apply import Executor
from kvserve_operator.client import ApiError, Client
from kvserve_operator.config import ProfilerConfig
from kvserve_operator.events import Recorder
from kvserve_operator.lease import Leadership
from kvserve_operator.reconcile import Reconciler

WORKERS: Final = 4
RETRY_S: Final = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the process runs.

    Attributes:
        profiler: What profiling Jobs are made of.
        namespaces: The namespaces to serve; empty for all.
        lease_namespace: Where the Lease is.
        health: ``host:port`` of the health endpoint.
    """

    profiler: ProfilerConfig
    namespaces: tuple[str, ...]
    lease_namespace: str
    health: str


async def run(options: Options) -> None:
    """Run until a signal to end.

    Raises:
        KVServeError: A part that must run for ever failed.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Client() as client:
        leadership = Leadership(
            client, namespace=options.lease_namespace, identity=_identity(os.environ)
        )
        client.may_write = leadership.held
        recorder = Recorder(client)
        reconciler = Reconciler(
            client, Executor(client, recorder), options.profiler, leads=leadership.held
        )
        leadership.on_gain = reconciler.add_all
        pulse = health.Pulse()
        server = await health.serve(options.health, lambda: health.vitals(pulse, leadership))
        try:
            parts: dict[str, Coroutine[Any, Any, None]] = {
                "stop": _wait(stop),
                "lease": leadership.run(),
                "events": recorder.run(),
                "resync": reconciler.resync(),
                "watch": _watch(client, reconciler, pulse, options),
                **{f"worker {n}": reconciler.work() for n in range(WORKERS)},
            }
            await _until_first(parts)
        finally:
            reconciler.queue.close()
            await leadership.release()
            await server.cleanup()


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _watch(
    client: Client, reconciler: Reconciler, pulse: health.Pulse, options: Options
) -> None:
    """Wait for the CRD and for permissions, then watch until kopf gets a signal, which it handles from then on."""
    told = ""
    while problem := await _obstacle(client, options.namespaces):
        if problem != told:
            logger.warning("waiting: %s", problem)
            told = problem
        await asyncio.sleep(RETRY_S)
    pulse.expect(resource[2] for resource in handlers.RESOURCES)
    try:
        await kopf.operator(
            registry=handlers.registry(reconciler, pulse),
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not options.namespaces,
            namespaces=options.namespaces,
        )
    # whatever ends the watches is answered in the same way: by a restart, which begins with the checks above
    except Exception as error:
        raise UnavailableError(f"the watches ended: {error}") from error


async def _obstacle(client: Client, namespaces: tuple[str, ...]) -> str:
    """Return why watching can't begin yet, or an empty string."""
    try:
        for group, version, plural in handlers.RESOURCES:
            base = f"/apis/{group}/{version}" if group else f"/api/{version}"
            for namespace in namespaces or ("",):
                inside = f"/namespaces/{namespace}" if namespace else ""
                await client.get(f"{base}{inside}/{plural}?limit=1")
    except ApiError as error:
        if error.status == 404:
            return (
                f"{PLURAL}.{GROUP} is not served: apply crds/{PLURAL}.yaml, or install the chart "
                "with crds.install=true"
            )
        return f"{error}; grant what docs/operations.md lists below Permissions"
    except UnavailableError as error:
        return str(error)
    return ""


async def _until_first(parts: dict[str, Coroutine[Any, Any, None]]) -> None:
    """Run the parts until one ends, then end the others; raise what the first raised."""
    tasks = {asyncio.create_task(part, name=name) for name, part in parts.items()}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        logger.info("%s ended", task.get_name())
        task.result()


def _identity(environ: os._Environ[str]) -> str:
    return f"{environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
