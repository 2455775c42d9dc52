"""The running controller: sources, streams, HTTP, and the loop that ties them together."""

import asyncio
import gc
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
from aiohttp import web

from kvserve_api import otel
from kvserve_api.credentials import NO_CREDENTIALS, CredentialFiles, Credentials
from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.rpc.control_pb2_grpc import add_ControlServicer_to_server
from kvserve_api.rpc.messages import MAX_MESSAGE_BYTES
from kvserve_controller import checkpoint
from kvserve_controller.checkpoint import Checkpoint
from kvserve_controller.cluster import ClusterSource
from kvserve_controller.controller import Controller
from kvserve_controller.directory import DirectorySource
from kvserve_controller.health import Health, application
from kvserve_controller.kube_client import KubeClient
from kvserve_controller.kube_status import StatusWriter
from kvserve_controller.kubeconfig import Access
from kvserve_controller.metrics import Metrics
from kvserve_controller.program import Instant
from kvserve_controller.service import ControlService
from kvserve_controller.source import Publish, Snapshot, Source

TICK_S: Final = 0.5
GRACE_S: Final = 2.0
"""How long streams may take to end when the controller does."""
SAVE_EVERY_S: Final = 30.0
GC_THRESHOLDS: Final = (20_000, 20, 20)
"""Reports are many objects and few cycles, and each collection holds up all streams: the usual 700 is too often."""
RECONNECT_S: Final = 3.0
"""How long pods get to reconnect after a start before the status says that they are gone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read ``host:port``, an IPv6 host in brackets.

        Raises:
            SpecError: It has another form.
        """
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise SpecError("address", f"must look like 0.0.0.0:7443, got {text!r}")
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        """Return ``host:port``."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run.

    Attributes:
        listen: Where pods connect.
        health: Where HTTP answers.
        policies: Directory of policies; None to watch a cluster.
        profiles: Directory of Pareto sets; None to watch a cluster.
        namespace: The namespace to watch; empty for all.
        prior_bytes_per_s: Goodput to assume for a link nobody has measured yet.
        state: File in which what was learned survives; None to learn anew after each start.
        credentials: What the controller proves itself with, and what it asks of pods.
    """

    listen: Address
    health: Address
    policies: Path | None = None
    profiles: Path | None = None
    namespace: str = ""
    prior_bytes_per_s: float
    state: Path | None = None
    credentials: CredentialFiles = NO_CREDENTIALS


def now() -> Instant:
    """Read both clocks."""
    return Instant(time.monotonic(), time.time())


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        SpecError: An address can't be used, or there is no way to the cluster.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    close_telemetry = otel.configure("kvserve-controller")
    try:
        async with AsyncExitStack() as stack:
            await _serve(options, stack, stop)
    finally:
        await asyncio.to_thread(close_telemetry)


async def _serve(options: Options, stack: AsyncExitStack, stop: asyncio.Event) -> None:
    metrics = Metrics()
    controller = Controller(
        prior_bytes_per_s=options.prior_bytes_per_s,
        now=now,
        metrics=metrics,
        checkpoint=_restore(options.state, metrics),
    )
    source: Source
    writer: StatusWriter | None = None
    if options.policies is not None and options.profiles is not None:
        source = DirectorySource(options.policies, options.profiles)
    else:
        client = await stack.enter_async_context(KubeClient(Access.find()))
        source = ClusterSource(client, options.namespace)
        writer = StatusWriter(client)
    health = Health(time.monotonic(), lambda: source.alive_s, lambda: controller.synced)
    await stack.enter_async_context(
        _http(options.health, application(health, controller.statuses, controller.decisions))
    )
    credentials = Credentials(options.credentials, "controller", serves=True)
    await stack.enter_async_context(grpc_server(options.listen, controller, credentials))
    # what was imported never becomes garbage: without it a collection does not hold up a thousand streams
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    health.listening = True
    tasks = [
        asyncio.create_task(source.run(_both(controller, writer))),
        asyncio.create_task(_turn(controller, health)),
        asyncio.create_task(stop.wait()),
    ]
    if writer is not None:
        tasks.append(asyncio.create_task(_write(controller, writer)))
    if options.state is not None:
        tasks.append(asyncio.create_task(_save(controller, metrics, options.state)))
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    health.listening = False
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    if options.state is not None:
        _write_state(controller, metrics, options.state)
    for task in done:
        task.result()


def _restore(path: Path | None, metrics: Metrics) -> Checkpoint | None:
    """Read what an earlier controller had learned; what can't be used is said and left behind."""
    if path is None:
        return None
    try:
        found = checkpoint.read(path)
    except ArtifactError as error:
        log.warning("state refused, learning starts anew", extra={"why": str(error)})
        metrics.checkpoint(error.reason)
        return None
    metrics.checkpoint("absent" if found is None else "restored")
    return found


async def _save(controller: Controller, metrics: Metrics, path: Path) -> None:
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        if controller.synced:
            # milliseconds, and nothing changes under its hands
            _write_state(controller, metrics, path)


def _write_state(controller: Controller, metrics: Metrics, path: Path) -> None:
    """Keep what was learned; a volume that can't be written costs only that."""
    if not controller.synced:
        return
    try:
        checkpoint.write(path, controller.checkpoint().document())
    except ArtifactError as error:
        log.warning("state not kept", extra={"why": str(error)})
        metrics.checkpoint(error.reason)
    else:
        metrics.checkpoint("written")


def _both(controller: Controller, writer: StatusWriter | None) -> Publish:
    def publish(snapshot: Snapshot) -> None:
        if writer is not None:
            writer.follow(snapshot)
        controller.apply(snapshot)

    return publish


async def _turn(controller: Controller, health: Health) -> None:
    while True:
        controller.tick()
        health.ticked_s = time.monotonic()
        await asyncio.sleep(TICK_S)


async def _write(controller: Controller, writer: StatusWriter) -> None:
    while not controller.synced:
        await asyncio.sleep(TICK_S)
    await asyncio.sleep(RECONNECT_S)
    while True:
        await asyncio.sleep(TICK_S)
        await writer.write(controller.statuses(), now())


@asynccontextmanager
async def grpc_server(
    address: Address, controller: Controller, credentials: Credentials | None = None
) -> AsyncIterator[int]:
    """Serve a controller's streams; yields the port.

    Args:
        address: Where.
        controller: What decides.
        credentials: What pods must prove; None believes everybody.

    Raises:
        SpecError: The address can't be used.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            # messages are small and rare: to measure the connection would be two more packets for each
            ("grpc.http2.bdp_probe", 0),
            # a pod that is gone without a word is noticed, and one that asks whether we are is answered
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ]
    )
    service = ControlService(
        controller.hub,
        on_hello=controller.announce,
        on_reports=controller.reports,
        on_decisions=controller.decided,
        on_refused=controller.refused,
        credentials=credentials,
    )
    add_ControlServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    try:
        secured = None if credentials is None else server_credentials(credentials)
        if secured is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), secured)
    except RuntimeError as error:
        raise SpecError("listen", f"can't use {address}: {error}") from error
    await server.start()
    log.info(
        "listening",
        extra={"address": f"{address.host}:{port}", "tls": secured is not None},
    )
    try:
        yield port
    finally:
        controller.hub.stop()
        await server.stop(GRACE_S)


def server_credentials(credentials: Credentials) -> grpc.ServerCredentials | None:
    """Return what the port is secured with, as new as the files for each connection; None for a plain port."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        loaded = credentials.current()
        pair = (loaded.key_pem or b"", loaded.cert_pem or b"")
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=loaded.ca_pem)

    loaded = credentials.current()
    if loaded.server is None:
        return None
    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=loaded.ca_pem is not None
    )


@asynccontextmanager
async def _http(address: Address, app: web.Application) -> AsyncIterator[None]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, address.host.strip("[]"), address.port)
        try:
            await site.start()
        except OSError as error:
            raise SpecError("health", f"can't use {address}: {error.strerror}") from error
        for name, *_ in runner.addresses:
            log.info("health", extra={"address": f"{name}:{runner.addresses[0][1]}"})
        yield
    finally:
        await runner.cleanup()
