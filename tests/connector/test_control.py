"""The pod's end of the control channel, against a real gRPC server on loopback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from kv_loopback import ENGINE, LAYOUT
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.messages import push_from_table
from kvserve_api.table import Role, Version
from kvserve_connector.client import Outcome
from kvserve_connector.coding import known_stages
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.control import MAX_REPORTS, ControlClient, Identity
from kvserve_connector.handover import Load
from kvserve_connector.remote import Remote
from kvserve_connector.selector import Selector
from tables import candidate, table


@dataclass
class FakeController(control_pb2_grpc.ControlServicer):
    """The smallest real server: keeps what pods say, and says what a test puts in its queue."""

    received: "asyncio.Queue[pb.PodMessage]" = field(default_factory=asyncio.Queue)
    to_send: "asyncio.Queue[pb.ControllerMessage | None]" = field(default_factory=asyncio.Queue)
    streams: int = 0

    async def Connect(  # noqa: N802
        self,
        requests: AsyncIterator[pb.PodMessage],
        context: "grpc.aio.ServicerContext[pb.PodMessage, pb.ControllerMessage]",
    ) -> AsyncIterator[pb.ControllerMessage]:
        """Serve one stream."""
        self.streams += 1

        async def listen() -> None:
            async for message in requests:
                await self.received.put(message)

        task = asyncio.ensure_future(listen())
        try:
            while (message := await self.to_send.get()) is not None:
                yield message
        finally:
            task.cancel()

    async def heard(self, body: str, timeout_s: float = 10.0) -> Any:
        """Return the next message of a kind; others before it are left out."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.received.get()
                if message.WhichOneof("body") == body:
                    return getattr(message, body)

    async def push(self, made: Any, nonce: str = "n") -> None:
        """Push a table."""
        await self.to_send.put(pb.ControllerMessage(push=push_from_table(made, nonce)))


@dataclass
class Bench:
    """A controller, and a client that is connected to it."""

    controller: FakeController
    selector: Selector
    client: ControlClient
    server: "grpc.aio.Server"
    port: int
    dropped: list[int]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Start both; the Hello is still to be heard."""
    controller, server = FakeController(), grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(controller, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    selector, dropped = Selector(), list[int]()
    client = ControlClient(
        ConnectorConfig(
            control_endpoint=f"127.0.0.1:{port}",
            policy="prod/chat",
            pod="p-0",
            namespace="prod",
            labels={"app": "x"},
        ),
        Identity(role=Role.DECODE, fingerprint="sha256:f", version="1.2"),
        selector,
        dropped.append,
        lambda ready: None,
    )
    client.start()
    yield Bench(controller, selector, client, server, port, dropped)
    await asyncio.to_thread(client.close)
    await controller.to_send.put(None)
    await server.stop(None)


def outcome(failure: str = "") -> Outcome:
    """Return a transfer's outcome."""
    remote = Remote(host="h", port=1, engine_id=ENGINE.engine_id, request_id="r", tokens=5)
    load = Load(
        request_id="r",
        remote=remote,
        tokens=range(5),
        prompt_digest="d",
        block_ids=(1,),
        workload="chat",
    )
    return Outcome(load=load, native_bytes=LAYOUT.native_bytes(5), wire_s=0.5, failure=failure)


async def until(holds: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


async def test_hello_says_who_and_what(bench: Bench) -> None:
    """The first message names pod, role, policy, labels, model and stages, and no version before there is a table."""
    hello = await bench.controller.heard("hello")
    assert (hello.pod, hello.namespace, hello.role) == ("p-0", "prod", "Decode")
    assert (hello.policy, dict(hello.labels)) == ("prod/chat", {"app": "x"})
    assert (hello.model_fingerprint, hello.connector_version) == ("sha256:f", "1.2")
    assert set(hello.stages) == known_stages()
    assert not hello.HasField("version")


async def test_table_is_acknowledged_and_in_force(bench: Bench) -> None:
    """A pushed table is in force when its Ack, with version and nonce, is heard."""
    await bench.controller.push(table(counter=3), "abc")
    ack = await bench.controller.heard("ack")
    assert (ack.version.epoch, ack.version.counter, ack.nonce) == (1, 3, "abc")
    assert bench.selector.table == table(counter=3)


async def test_bad_tables_are_refused_and_the_last_good_one_stays(bench: Bench) -> None:
    """A table that can't be read, can't be built or is older is answered by a Nack with the reason."""
    await bench.controller.push(table(counter=5))
    await bench.controller.heard("ack")

    bundled = {"none": candidate("none"), "lossless": candidate("lossless", bundle="sha256:1")}
    await bench.controller.push(table(*bundled, candidates=bundled, counter=6), "six")
    nack = await bench.controller.heard("nack")
    assert (nack.reason, nack.nonce, nack.version.counter) == ("Unsupported", "six", 6)

    broken = push_from_table(table(counter=7), "seven")
    broken.table.candidates[1].strategy = b"{"
    await bench.controller.to_send.put(pb.ControllerMessage(push=broken))
    nack = await bench.controller.heard("nack")
    assert (nack.reason, nack.nonce) == ("InvalidSpec", "seven")
    assert "candidates" in nack.detail

    await bench.controller.push(table(counter=4), "four")
    nack = await bench.controller.heard("nack")
    assert (nack.reason, nack.nonce) == ("StaleVersion", "four")
    await bench.controller.push(table(counter=5), "again")
    assert (await bench.controller.heard("ack")).nonce == "again"
    assert bench.selector.table == table(counter=5)


async def test_heartbeat_renews(bench: Bench) -> None:
    """A heartbeat of the version in force makes the table young again."""
    await bench.controller.push(table())
    await bench.controller.heard("ack")
    await asyncio.sleep(0.3)
    assert bench.selector.age_s >= 0.3
    beat = pb.Heartbeat(version=pb.Version(epoch=1, counter=1))
    await bench.controller.to_send.put(pb.ControllerMessage(heartbeat=beat))
    await until(lambda: bench.selector.age_s < 0.2)


async def test_release_drops_the_table(bench: Bench) -> None:
    """A pod that no policy wants any more has no table."""
    await bench.controller.push(table())
    await bench.controller.heard("ack")
    message = pb.ControllerMessage(release=pb.Release(reason="policy deleted"))
    await bench.controller.to_send.put(message)
    await until(lambda: bench.selector.table is None)


async def test_reconnects_with_the_version_it_holds(bench: Bench) -> None:
    """After the stream ends the table holds, and the next Hello names it."""
    await bench.controller.push(table(counter=8))
    await bench.controller.heard("ack")
    await bench.controller.to_send.put(None)
    hello = await bench.controller.heard("hello")
    assert (
        Version(epoch=hello.version.epoch, counter=hello.version.counter)
        == table(counter=8).version
    )
    assert bench.selector.table == table(counter=8)
    assert bench.controller.streams == 2


async def test_reports_are_delivered(bench: Bench) -> None:
    """What a transfer did reaches the controller, failures too."""
    await bench.controller.heard("hello")
    bench.client.report(outcome())
    bench.client.report(outcome("Timeout"))
    reports = (await bench.controller.heard("reports")).reports
    assert [report.failure for report in reports] == ["", "Timeout"]
    assert reports[0].workload == "chat"
    assert reports[0].native_bytes == LAYOUT.native_bytes(5)
    assert reports[0].wire_s == 0.5


async def test_reports_without_controller_are_bounded(bench: Bench) -> None:
    """Reports that nobody takes make room for newer ones and are counted; reporting never waits."""
    await bench.controller.heard("hello")
    await bench.server.stop(None)
    await asyncio.sleep(0.1)
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    for _ in range(MAX_REPORTS + 50):
        bench.client.report(outcome())
    assert loop.time() - started_s < 1
    assert sum(bench.dropped) >= 50


async def test_absent_controller_is_looked_for_and_no_more() -> None:
    """With nobody at the endpoint the client keeps trying, and can be closed at any time."""
    selector = Selector()
    config = replace(ConnectorConfig(), control_endpoint="127.0.0.1:1")
    client = ControlClient(
        config,
        Identity(role=Role.PREFILL, fingerprint="", version=""),
        selector,
        lambda count: None,
        lambda ready: None,
    )
    client.start()
    await asyncio.sleep(0.5)
    async with asyncio.timeout(4):
        await asyncio.to_thread(client.close)
    assert selector.table is None
