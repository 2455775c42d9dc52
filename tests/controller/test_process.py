"""The controller as a process of its own: started, changed, stopped, frozen and killed."""

import asyncio
import json
import signal
import time
from typing import Any

import grpc
import pytest

from kvserve_api import telemetry
from kvserve_api.decision import decide
from kvserve_api.errors import SpecError
from kvserve_api.latency import Link
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import decision_to_message
from kvserve_controller.controller import audit
from kvserve_controller.explain_cli import latest
from otlp_receiver import Receiver
from podclient import PodClient, transfer_report, until

Process = Any


async def wait_for(condition: Any, timeout_s: float = 15.0) -> None:
    """Wait until an asynchronous condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        await asyncio.sleep(0.1)


def audit_lines(process: Process) -> list[dict[str, Any]]:
    """Return the records of the audit log."""
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    return [line for line in lines if line["logger"] == audit.name]


async def test_directories_end_to_end(controller_process: Process) -> None:
    """Files become a table, edits become another without a restart, and everything can be seen and audited."""
    process = controller_process
    process.write_policy()
    process.start()
    async with (
        PodClient(process.address, "p", "Prefill") as producer,
        PodClient(process.address, "d", "Decode") as decoder,
    ):
        await asyncio.sleep(0.2)
        assert (producer.pushed, decoder.pushed) == ([], [])
        process.write_set()
        await until(lambda: producer.table and decoder.table)
        await wait_for(lambda: has_reason(process, "Acknowledged"))

        process.write_policy(control={"mode": "Pinned", "pinnedProfile": "int8"})
        await until(lambda: producer.table and producer.table.pinned == "int8")
        await wait_for(lambda: has_active(process, "int8"))

        (process.policies / "chat.yaml").write_text("kind: KVServePolicy")
        await wait_for(lambda: has_reason(process, "InvalidPolicy"))
        await decoder.report(transfer_report("int8"))
        assert len(producer.pushed) == 2

        (process.policies / "chat.yaml").unlink()
        await until(lambda: producer.releases and decoder.releases)
    assert process.end() == 0
    compiled = [line["audit"] for line in audit_lines(process) if line["message"] == "compiled"]
    assert [record["cause"] for record in compiled] == ["Started", "PolicyChanged"]
    assert compiled[0]["rules"]["default"]["candidates"] == ["rans", "int4", "int8", "none"]
    assert compiled[0]["pareto_digest"].startswith("sha256:")


async def has_active(process: Process, name: str) -> bool:
    """Tell whether a profile is the policy's active one."""
    return bool((await process.status())["activeProfile"]["name"] == name)


async def has_reason(process: Process, reason: str) -> bool:
    """Tell whether the policy's condition Programmed has a reason."""
    conditions = (await process.status()).get("conditions", [{}])
    return bool(conditions[0].get("reason") == reason)


async def test_killed_controller_takes_nothing_away(controller_process: Process) -> None:
    """After SIGKILL pods keep their tables; the next controller's versions are above theirs."""
    process = controller_process
    process.write_policy()
    process.write_set()
    process.start()
    async with PodClient(process.address, "d", "Decode") as first:
        await until(lambda: first.table)
        process.end(signal.SIGKILL)
        assert (await first.ended()).code() == grpc.StatusCode.UNAVAILABLE
        assert first.table is not None
    process.start()
    async with PodClient(process.address, "d", "Decode", table=first.table) as second:
        await until(lambda: second.pushed)
        assert second.pushed[0][0] > first.pushed[0][0]


@pytest.mark.slow
async def test_frozen_controller_takes_nothing_away(controller_process: Process) -> None:
    """While the controller is stopped by SIGSTOP pods keep table and stream, and later hear of it again."""
    process = controller_process
    process.write_policy(control={"failsafe": {"leaseSeconds": 5}})
    process.write_set()
    process.start()
    async with PodClient(process.address, "d", "Decode") as decoder:
        await until(lambda: decoder.table and decoder.heartbeats)
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(0.5)
        beats = len(decoder.heartbeats)
        await asyncio.sleep(6)
        assert len(decoder.heartbeats) == beats
        assert decoder.table is not None
        assert decoder.error is None
        process.signal(signal.SIGCONT)
        await until(lambda: len(decoder.heartbeats) > beats)


def test_probes(controller_process: Process) -> None:
    """It is live at once, ready when it has read its directories, and gone when ended."""
    process = controller_process
    process.start()
    assert process.get("/healthz") == (200, "ok")
    assert process.get("/readyz") == (200, "ok")
    assert process.get("/status") == (200, "{}")
    assert process.end() == 0
    assert process.get("/healthz")[0] == 0


def test_occupied_port_is_a_clear_error(controller_process: Process) -> None:
    """A second controller on the same port says so and ends."""
    process = controller_process
    process.start()
    first, process.health = process.process, process.address
    process.start(wait=False)
    assert process.process.wait(15) == 1
    assert f"health: can't use {process.address}" in process.log.read_text()
    process.process = first


async def test_decisions_can_be_asked_for_and_learning_survives(
    controller_process: Process,
) -> None:
    """What pods decided is answered with its reasons, and a controller killed and damaged starts all the same."""
    process = controller_process
    state = process.folder / "state.json"
    process.arguments = (
        *("--policies", str(process.policies), "--profiles", str(process.profiles)),
        *("--state", str(state)),
    )
    process.write_policy()
    process.write_set()
    process.start()
    slow = transfer_report("int4", encode_s=0.1, wire_bytes=2_777_777)
    async with PodClient(process.address, "p", "Prefill") as producer:
        await until(lambda: producer.table)
        link = Link(bytes_per_s=1e7)
        assert producer.table is not None
        made = decide(producer.table, "default", native_bytes=10_000_000, link=link, wall_s=1.0)
        await producer.send(decisions=pb.Decisions(decisions=[decision_to_message(made)]))
        await producer.report(*[slow] * 30)
        url = f"http://{process.health}"

        async def told() -> bool:
            return bool(await asyncio.to_thread(latest, url, "default/chat", 5))

        await wait_for(told)
        (found,) = await asyncio.to_thread(latest, url, "default/chat", 5)
        await until(lambda: len(producer.pushed) >= 2)
    assert (found["pod"], found["wanted"], found["bound"]) == ("p", "int4", "Goal")
    with pytest.raises(SpecError, match="no such policy"):
        latest(url, "default/nobody", 5)
    assert process.get("/decisions?policy=default/chat&limit=x")[0] == 400
    assert process.end() == 0

    process.start()
    async with PodClient(process.address, "p", "Prefill") as producer:
        await until(lambda: producer.table)
        assert producer.table is not None
        assert producer.table.candidates["int4"].encode.seconds(1e9) > 3.0
    assert process.end() == 0
    state.write_bytes(state.read_bytes()[:-10])
    process.start()
    async with PodClient(process.address, "p", "Prefill") as producer:
        await until(lambda: producer.table)
        assert producer.table is not None
        assert producer.table.candidates["int4"].encode.seconds(1e9) == pytest.approx(1.0)
    assert "state refused, learning starts anew" in process.log.read_text()


async def test_telemetry_arrives(controller_process: Process) -> None:
    """Compiling is a span and pushes, reports and streams are metrics, at a real OTLP receiver."""
    process = controller_process
    process.write_policy()
    process.write_set()
    with Receiver() as receiver:
        process.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        process.start()
        async with PodClient(process.address, "d", "Decode") as decoder:
            await until(lambda: decoder.table)
            await decoder.report(transfer_report("int4"), transfer_report("int4", encode_s=-1.0))
            await until(lambda: has_points(receiver), 10)
        assert await asyncio.to_thread(process.end) == 0
        spans = [span for span in receiver.spans if span.name == telemetry.SPAN_COMPILE]
    assert spans[0].service == "kvserve-controller"
    assert spans[0].attributes[telemetry.ATTR_POLICY] == "default/chat"
    assert spans[0].attributes[telemetry.ATTR_REASON] == "Started"


def has_points(receiver: Receiver) -> bool:
    """Tell whether all of the controller's metrics have arrived with what they should say."""
    points = {
        (point.name, point.attributes.get(telemetry.ATTR_REASON)): point.value
        for point in receiver.points
        if point.attributes.get(telemetry.ATTR_POLICY) == "default/chat"
    }
    expected = {
        (telemetry.CONTROLLER_PUSHES.name, "ack"): 1,
        (telemetry.CONTROLLER_REPORTS.name, "Learned"): 1,
        (telemetry.CONTROLLER_REPORTS.name, "Negative"): 1,
        (telemetry.CONTROLLER_STREAMS.name, "synced"): 1,
    }
    return all(points.get(key) == value for key, value in expected.items())
