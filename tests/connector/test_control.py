"""The pod's end of the control channel, against a real gRPC server on loopback."""

import asyncio
import statistics
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from kv_loopback import ENGINE, LAYOUT
from kvserve_api.latency import Link
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.messages import decision_from_message, push_from_table
from kvserve_api.table import DecisionTable, Role, Version
from kvserve_connector import control
from kvserve_connector.bundles import BundleBook
from kvserve_connector.coding import known_stages
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.control import MAX_REPORTS, ControlClient
from kvserve_connector.control_messages import Identity
from kvserve_connector.handover import Load
from kvserve_connector.outcome import Outcome
from kvserve_connector.ready import ReadyTable
from kvserve_connector.remote import Remote
from kvserve_connector.selector import Selector
from kvserve_strategies.artifacts import Store, open_store
from random_bundles import joint_strategy, write_sample
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
    bundles: BundleBook


@asynccontextmanager
async def running(
    store: Store | None = None,
    patience_s: float = 20.0,
    warm_up: Callable[[ReadyTable], None] = lambda ready: None,
) -> AsyncIterator[Bench]:
    """Start both; the Hello is still to be heard."""
    bundles = BundleBook(store, ENGINE.fingerprint, LAYOUT, patience_s=patience_s)
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
        bundles,
        warm_up,
    )
    client.start()
    yield Bench(controller, selector, client, server, port, dropped, bundles)
    await asyncio.to_thread(client.close)
    await controller.to_send.put(None)
    await server.stop(None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fetched bundles apart from those of other tests."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A pod that knows no artifact store."""
    async with running() as made:
        yield made


def outcome(failure: str = "") -> Outcome:
    """Return a transfer's outcome."""
    remote = Remote(host="h", port=1, engine_id=ENGINE.engine_id, request_id="r", tokens=5)
    load = Load(
        request_id="r",
        remote=remote,
        tokens=range(5),
        prompt_digest="d",
        block_ids=((1,),),
        workload="chat",
    )
    return Outcome(load=load, native_bytes=LAYOUT.native_bytes(5), wire_s=0.5, failure=failure)


def calibrated(bundle: str, **changes: Any) -> DecisionTable:
    """Return a table with a candidate that needs a bundle."""
    joint = candidate("int4-token", strategy=joint_strategy(), bundle=bundle)
    candidates = {"none": candidate("none"), "int4-token": joint}
    return table(*candidates, candidates=candidates, **changes)


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

    await bench.controller.push(calibrated("sha256:" + "1" * 64, counter=6), "six")
    nack = await bench.controller.heard("nack")
    assert (nack.reason, nack.nonce, nack.version.counter) == ("Unsupported", "six", 6)
    assert "KVSERVE_ARTIFACTS" in nack.detail

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


async def test_bundles_are_there_before_the_word(tmp_path: Path) -> None:
    """When a table that needs a bundle is acknowledged, blobs that are coded with it can be decoded."""
    store = open_store((tmp_path / "store").as_uri())
    bundle = write_sample(tmp_path / "b", LAYOUT, ENGINE.fingerprint)
    store.put_bundle(tmp_path / "b")
    async with running(store) as bench:
        assert bench.bundles.ready == frozenset()
        await bench.controller.push(calibrated(bundle.digest))
        await bench.controller.heard("ack")
        assert bench.bundles.ready == {bundle.digest}
        found = bench.bundles.find(bundle.digest)
        assert found is not None
        assert found.digest == bundle.digest
        assert bench.selector.table == calibrated(bundle.digest)


async def test_a_bundle_that_is_nowhere_refuses_the_table(tmp_path: Path) -> None:
    """A bundle that the store does not have, or that is of another model, leaves the last good table in force."""
    store = open_store((tmp_path / "store").as_uri())
    other = write_sample(tmp_path / "b", LAYOUT, "sha256:" + "9" * 64)
    store.put_bundle(tmp_path / "b")
    async with running(store) as bench:
        await bench.controller.push(table(counter=1))
        await bench.controller.heard("ack")
        await bench.controller.push(calibrated("sha256:" + "1" * 64, counter=2))
        assert (await bench.controller.heard("nack")).reason == "InvalidArtifact"
        await bench.controller.push(calibrated(other.digest, counter=3))
        nack = await bench.controller.heard("nack")
        assert nack.reason == "Unsupported"
        assert "another model" in nack.detail
        assert bench.selector.table == table(counter=1)
        assert bench.bundles.ready == frozenset()


async def test_a_store_that_is_away_is_looked_for(tmp_path: Path) -> None:
    """While the store's volume is not there the table waits, heartbeats count, and then it comes into force."""
    folder = tmp_path / "store"
    bundle = write_sample(tmp_path / "b", LAYOUT, ENGINE.fingerprint)
    open_store((tmp_path / "ready").as_uri()).put_bundle(tmp_path / "b")
    async with running(open_store(folder.as_uri())) as bench:
        await bench.controller.push(table(counter=1))
        await bench.controller.heard("ack")
        await bench.controller.push(calibrated(bundle.digest, counter=2))
        await asyncio.sleep(0.3)
        beat = pb.Heartbeat(version=pb.Version(epoch=1, counter=1))
        await bench.controller.to_send.put(pb.ControllerMessage(heartbeat=beat))
        await until(lambda: bench.selector.age_s < 0.2)
        (tmp_path / "ready").rename(folder)
        ack = await bench.controller.heard("ack")
        assert ack.version.counter == 2


async def test_a_store_that_stays_away_is_said_so(tmp_path: Path) -> None:
    """After its patience the pod refuses for now, by the reason that makes the controller send the table again."""
    store = open_store((tmp_path / "store").as_uri())
    async with running(store, patience_s=0.6) as bench:
        await bench.controller.push(calibrated("sha256:" + "1" * 64), "x")
        nack = await bench.controller.heard("nack")
        assert (nack.reason, nack.nonce) == ("Unavailable", "x")
        assert bench.selector.table is None


async def test_a_released_pod_takes_no_late_table(tmp_path: Path) -> None:
    """A table whose bundle arrives after the pod was released does not come into force."""
    folder = tmp_path / "store"
    bundle = write_sample(tmp_path / "b", LAYOUT, ENGINE.fingerprint)
    open_store((tmp_path / "ready").as_uri()).put_bundle(tmp_path / "b")
    async with running(open_store(folder.as_uri())) as bench:
        await bench.controller.push(calibrated(bundle.digest))
        await asyncio.sleep(0.3)
        message = pb.ControllerMessage(release=pb.Release(reason="policy deleted"))
        await bench.controller.to_send.put(message)
        assert (await bench.controller.heard("nack")).reason == "Unavailable"
        (tmp_path / "ready").rename(folder)
        await asyncio.sleep(1.0)
        assert bench.selector.table is None


async def test_a_table_that_takes_long_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not ready in time is refused for now and does not come into force behind the controller's back."""
    monkeypatch.setattr(control, "ANSWER_S", 0.3)
    ready_now = threading.Event()

    def warm_up(ready: ReadyTable) -> None:
        ready_now.wait(10)

    async with running(warm_up=warm_up) as bench:
        await bench.controller.push(table(counter=1), "slow")
        nack = await bench.controller.heard("nack")
        assert (nack.reason, nack.nonce) == ("Unavailable", "slow")
        ready_now.set()
        await asyncio.sleep(0.3)
        assert bench.selector.table is None
        await bench.controller.push(table(counter=1), "again")
        assert (await bench.controller.heard("ack")).nonce == "again"


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
    took_s = []
    for _ in range(MAX_REPORTS + 50):
        started_s = loop.time()
        bench.client.report(outcome())
        took_s.append(loop.time() - started_s)
    # the median: the machine may take the core away now and then
    assert statistics.median(took_s) * len(took_s) < 1
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
        BundleBook(None, "", LAYOUT),
        lambda ready: None,
    )
    client.start()
    await asyncio.sleep(0.5)
    async with asyncio.timeout(4):
        await asyncio.to_thread(client.close)
    assert selector.table is None


async def test_decisions_are_told() -> None:
    """What the pod decided arrives at the controller as it was made, once."""
    async with running() as bench:
        await bench.controller.heard("hello")
        await bench.controller.push(table())
        await bench.controller.heard("ack")
        link = Link(bytes_per_s=1e6, backlog_bytes=5.0)
        choice = bench.selector.choose(
            "default",
            native_bytes=10_000_000,
            link=link,
            chunks=6,
            stages=known_stages(),
            peer="10.0.0.2",
        )
        (told,) = (await bench.controller.heard("decisions")).decisions
        decision = decision_from_message(told)
        assert (decision.peer, decision.link, decision.selection) == (
            "10.0.0.2",
            link,
            choice.selection,
        )
        assert decision.candidates == table().rules["default"].candidates
        assert not bench.selector.decisions
