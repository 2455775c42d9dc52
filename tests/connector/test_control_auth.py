"""A pod and the real controller prove themselves to each other, or have nothing to do with each other."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from kv_loopback import LAYOUT
from kvserve_api.credentials import CredentialFiles, Credentials
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.auth import NONCE_KEY, PROOF_KEY
from kvserve_api.rpc.messages import push_from_table
from kvserve_api.table import Role
from kvserve_connector.bundles import BundleBook
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.control import ControlClient
from kvserve_connector.control_messages import Identity
from kvserve_connector.selector import Selector
from kvserve_controller.controller import Controller
from kvserve_controller.metrics import Metrics
from kvserve_controller.server import Address, grpc_server, now
from kvserve_controller.session import Ending
from members import Members
from tables import table

NOTHING = CredentialFiles()


@dataclass
class Counted(Metrics):
    """Metrics that can be read."""

    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def refused(self, reason: str) -> None:
        """Count a stream that was refused."""
        self.refusals.append(reason)


@dataclass
class Bench:
    """A controller and a pod that looks for it."""

    controller: Controller
    metrics: Counted
    selector: Selector
    failures: list[str]

    @property
    def connected(self) -> int:
        """How many pods the controller has."""
        return len(self.controller.hub.sessions)

    async def until(self, holds: Any) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(8):
            while not holds():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def pod(port: int, credentials: CredentialFiles) -> AsyncIterator[tuple[Selector, list[str]]]:
    """Run a pod's end of the channel."""
    failures: list[str] = []
    selector = Selector()
    client = ControlClient(
        ConnectorConfig(control_endpoint=f"127.0.0.1:{port}", credentials=credentials),
        Identity(role=Role.DECODE, fingerprint="sha256:f", version="1"),
        selector,
        lambda count: None,
        BundleBook(None, "", LAYOUT),
        lambda ready: None,
        failed=failures.append,
    )
    client.start()
    try:
        yield selector, failures
    finally:
        await asyncio.to_thread(client.close)


@asynccontextmanager
async def running(server: CredentialFiles, client: CredentialFiles) -> AsyncIterator[Bench]:
    """Run both ends."""
    metrics = Counted()
    controller = Controller(prior_bytes_per_s=1e8, now=now, metrics=metrics)
    credentials = Credentials(server, "controller", serves=True)
    async with (
        grpc_server(Address(host="127.0.0.1", port=0), controller, credentials) as port,
        pod(port, client) as (selector, failures),
    ):
        yield Bench(controller, metrics, selector, failures)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The deployment."""
    return Members(tmp_path_factory.mktemp("members"))


@pytest.mark.parametrize("kind", ["nothing", "secret", "mtls", "both", "server's certificate"])
async def test_members_connect(members: Members, kind: str) -> None:
    """With the same secret, with certificates, or with both, a pod's Hello is taken up."""
    tls, both = members.with_tls(), members.with_tls(secret=True)
    server, client = {
        "nothing": (NOTHING, NOTHING),
        "secret": (members.with_secret(),) * 2,
        "mtls": (tls, tls),
        "both": (both, both),
        "server's certificate": (
            CredentialFiles(tls_cert_file=tls.tls_cert_file, tls_key_file=tls.tls_key_file),
            members.authority_only,
        ),
    }[kind]
    async with running(server, client) as bench:
        await bench.until(lambda: bench.connected == 1)
        assert bench.failures == bench.metrics.refusals == []


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        pytest.param("no secret", True, id="no secret"),
        pytest.param("wrong secret", False, id="wrong secret"),
        pytest.param("controller without secret", True, id="controller without secret"),
        pytest.param("TLS to plain", False, id="TLS to plain"),
        pytest.param("another authority", False, id="another authority"),
        pytest.param("expired", False, id="expired"),
        pytest.param("certificate without secret", True, id="certificate without secret"),
    ],
)
async def test_strangers_are_refused(
    members: Members, tmp_path: Path, case: str, refused: bool
) -> None:
    """Who does not belong together is told so by one reason on the pod, and by the controller where it refuses."""
    others = Members(tmp_path / "others", secret="o" * 40)
    members.issue("late", valid_s=-60)
    tls, secret = members.with_tls(), members.with_secret()
    server, client = {
        "no secret": (secret, NOTHING),
        "wrong secret": (secret, others.with_secret()),
        "controller without secret": (NOTHING, secret),
        "TLS to plain": (NOTHING, tls),
        "another authority": (others.with_tls(), tls),
        "expired": (members.with_tls("late"), tls),
        "certificate without secret": (members.with_tls(secret=True), tls),
    }[case]
    async with running(server, client) as bench:
        await bench.until(lambda: "Unauthenticated" in bench.failures)
        assert bench.connected == 0
        if refused:
            await bench.until(lambda: bench.metrics.refusals)
            assert set(bench.metrics.refusals) == {"Unauthenticated"}


@pytest.mark.parametrize("stranger", ["plain", "without certificate", "with a late one"])
async def test_a_controller_with_tls_keeps_out(members: Members, stranger: str) -> None:
    """A pod that the controller's TLS refuses gets no stream; gRPC tells it no more than that."""
    members.issue("late", valid_s=-60)
    client = {
        "plain": NOTHING,
        "without certificate": members.authority_only,
        "with a late one": members.with_tls("late"),
    }[stranger]
    async with running(members.with_tls(), client) as bench:
        await bench.until(lambda: bench.failures)
        assert set(bench.failures) <= {"Unavailable", "Unauthenticated"}
        assert bench.connected == 0


async def test_secrets_change_while_both_run(tmp_path: Path) -> None:
    """After secrets and certificates changed on both sides, the next stream uses the new ones without a restart."""
    members = Members(tmp_path)
    files = members.with_tls(secret=True)
    async with running(files, files) as bench:
        await bench.until(lambda: bench.connected == 1)
        members.issue("pod")
        (tmp_path / "secret").write_text("n" * 40)
        (session,) = bench.controller.hub.sessions.values()
        session.end(Ending.SILENT, "a test")
        await bench.until(lambda: bench.failures)
        await bench.until(lambda: bench.connected == 1)
        assert list(bench.controller.hub.sessions.values()) != [session]
        assert "Unauthenticated" not in bench.failures


class Impostor(control_pb2_grpc.ControlServicer):
    """Pushes a table to whoever connects, and proves nothing, or what it heard elsewhere."""

    def __init__(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        self._metadata = metadata
        self.hellos: list[pb.Hello] = []

    async def Connect(  # noqa: N802
        self, requests: AsyncIterator[pb.PodMessage], context: Any
    ) -> AsyncIterator[pb.ControllerMessage]:
        """Serve one stream."""
        await context.send_initial_metadata(self._metadata)
        yield pb.ControllerMessage(push=push_from_table(table(), "n"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                async for message in requests:
                    self.hellos.append(message.hello)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param((), id="nothing"),
        pytest.param(((NONCE_KEY, b"n" * 32), (PROOF_KEY, b"p" * 32)), id="made up"),
        pytest.param(((NONCE_KEY, b""), (PROOF_KEY, b"")), id="empty"),
    ],
)
async def test_an_impostor_is_told_nothing(
    members: Members, metadata: tuple[tuple[str, bytes], ...]
) -> None:
    """A controller that does not prove to hold the secret hears no Hello, and its table does not come into force."""
    impostor, server = Impostor(metadata), grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(impostor, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with pod(port, members.with_secret()) as (selector, failures):
            deadline_s = time.monotonic() + 8
            while not failures and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)
            assert set(failures) == {"Unauthenticated"}
            assert selector.table is None
            assert impostor.hellos == []
    finally:
        await server.stop(None)
