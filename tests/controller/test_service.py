"""The push channel over real gRPC streams."""

import asyncio
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest

from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.control_pb2_grpc import ControlStub
from kvserve_api.rpc.messages import MAX_MESSAGE_BYTES, version_from_message
from kvserve_api.table import Version
from kvserve_controller import service
from podclient import PodClient, transfer_report, until

Served = Any


def later(push: pb.Push) -> None:
    """Answer nothing to a table."""


def all_pushed(pods: list[PodClient], count: int) -> bool:
    """Tell whether each pod was sent so many tables, and holds the last."""
    return all(
        len(pod.pushed) >= count and pod.table and pod.table.version == pod.pushed[-1][0]
        for pod in pods
    )


async def test_table_reaches_both_roles(served: Served) -> None:
    """A policy's table arrives whole at both of its pods and counts as acknowledged."""
    served.apply()
    async with (
        PodClient(served.address, "p", "Prefill") as producer,
        PodClient(served.address, "d", "Decode") as decoder,
    ):
        await until(lambda: producer.table and decoder.table)
        assert producer.table == decoder.table
        assert producer.table is not None
        assert producer.table.rules["default"].candidates == ("rans", "int4", "int8", "none")
        await until(lambda: served.controller.statuses()["default/chat"]["targets"][0]["synced"])


async def test_decoder_acknowledges_before_producer_is_sent(served: Served) -> None:
    """Over real streams a producer is sent a table after the decoder's answer, however long that takes."""
    async with (
        PodClient(served.address, "p", "Prefill") as producer,
        PodClient(served.address, "d", "Decode", answer=later) as decoder,
    ):
        await until(lambda: len(served.controller.hub.sessions) == 2)
        served.apply()
        await until(lambda: decoder.pushed)
        await asyncio.sleep(0.3)
        assert producer.pushed == []
        answered_s = time.monotonic()
        epoch, counter = decoder.pushed[0][0].epoch, decoder.pushed[0][0].counter
        await decoder.send(ack=pb.Ack(version=pb.Version(epoch=epoch, counter=counter), nonce="1"))
        await until(lambda: producer.pushed)
        assert producer.pushed[0][1] >= answered_s
        assert producer.pushed[0][0] == decoder.pushed[0][0]


async def test_silent_decoder_holds_up_producers_for_a_while_only(served: Served) -> None:
    """A Decode pod that never answers delays the Prefill pods by its time to answer, not more."""
    async with (
        PodClient(served.address, "p", "Prefill") as producer,
        PodClient(served.address, "d", "Decode", answer=later) as decoder,
    ):
        await until(lambda: len(served.controller.hub.sessions) == 2)
        served.apply()
        await until(lambda: producer.table, 5)
        assert 0.9 < producer.pushed[0][1] - decoder.pushed[0][1] < 3.0


async def test_stuck_pods_delay_nobody(served: Served) -> None:
    """Pods that don't answer, or don't even read, neither delay other pods nor stay connected."""
    async with AsyncExitStack() as stack:
        stuck = await stack.enter_async_context(
            PodClient(served.address, "stuck", "Decode", answer=later)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.address))
        deaf = ControlStub(channel).Connect()  # type: ignore[no-untyped-call]
        hello = pb.Hello(pod="deaf", role="Decode", labels={"app": "chat-decode"})
        await deaf.write(pb.PodMessage(hello=hello))
        good = [
            await stack.enter_async_context(PodClient(served.address, f"d{n}", "Decode"))
            for n in range(10)
        ]
        await until(lambda: len(served.controller.hub.sessions) == 12)
        for generation, budget in enumerate((40, 60, 80, 60, 40), start=1):
            began_s = time.monotonic()
            served.apply(quality={"maxLossBasisPoints": budget}, generation=generation)
            await until(partial(all_pushed, good, generation))
            assert max(p.pushed[-1][1] for p in good) - began_s < 0.5
            await asyncio.sleep(0.05)
        error = await stuck.ended(5)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "was not answered in 1 s" in (error.details() or "")
        await until(lambda: len(served.controller.hub.sessions) == 10)


async def test_refused_table_is_not_repeated(served: Served) -> None:
    """A pod that refuses a table keeps its last one, is told nothing until there is another, and is reported."""
    served.apply()
    answers: list[bool | str] = [True, "UnknownStage", True]
    async with PodClient(served.address, "d", "Decode", answer=lambda _: answers.pop(0)) as decoder:
        await until(lambda: decoder.table)
        first = decoder.table
        served.apply(quality={"maxLossBasisPoints": 10})
        await until(lambda: served.controller.hub.counts("default/chat")["Decode"].rejected)
        await asyncio.sleep(0.2)
        assert len(decoder.pushed) == 2
        assert decoder.table == first
        served.apply(quality={"maxLossBasisPoints": 70})
        await until(lambda: len(decoder.pushed) == 3 and decoder.table != first)


@pytest.mark.parametrize(
    ("hello", "code", "detail"),
    [
        pytest.param(
            pb.Hello(pod="p", role="kv_both"), "INVALID_ARGUMENT", "hello.role", id="role"
        ),
        pytest.param(
            pb.Hello(pod="p", role="Decode", labels={"app": "chat-prefill"}),
            "FAILED_PRECONDITION",
            "selects pod default/p as Prefill",
            id="other-role",
        ),
        pytest.param(
            pb.Hello(pod="p", role="Decode", version=pb.Version(epoch=2**63, counter=1)),
            "INVALID_ARGUMENT",
            "version.epoch",
            id="absurd-version",
        ),
        pytest.param(
            pb.Hello(pod="p", role="Decode", labels={"x": "y" * MAX_MESSAGE_BYTES}),
            "RESOURCE_EXHAUSTED",
            "larger than max",
            id="huge",
        ),
        pytest.param(None, "INVALID_ARGUMENT", "must be the first message", id="no-hello"),
    ],
)
async def test_bad_hello_ends_the_stream(
    served: Served, hello: pb.Hello | None, code: str, detail: str
) -> None:
    """A stream that doesn't start as agreed is ended with a status and what to correct."""
    served.apply()
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = ControlStub(channel).Connect()  # type: ignore[no-untyped-call]
        message = pb.PodMessage(hello=hello) if hello else pb.PodMessage(ack=pb.Ack())
        await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError, match=detail) as caught:
            await asyncio.wait_for(call.read(), 5)
    assert caught.value.code() == grpc.StatusCode[code]
    assert served.controller.hub.sessions == {}


async def test_second_stream_of_a_pod_ends_the_first(served: Served) -> None:
    """A pod that reconnects before its old stream is noticed dead counts once."""
    served.apply()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(PodClient(served.address, "d", "Decode"))
        await until(lambda: first.table)
        second = await stack.enter_async_context(PodClient(served.address, "d", "Decode"))
        assert (await first.ended()).code() == grpc.StatusCode.ABORTED
        await until(lambda: second.table)
        assert served.controller.hub.counts("default/chat")["Decode"].connected == 1


async def test_deleted_policy_releases_its_pods(served: Served) -> None:
    """A pod whose policy is deleted drops its table, and gets one again when the policy returns."""
    served.apply()
    async with PodClient(served.address, "d", "Decode") as decoder:
        await until(lambda: decoder.table)
        served.controller.apply({})
        await until(lambda: decoder.releases)
        assert decoder.table is None
        served.apply()
        await until(lambda: decoder.table)
        assert decoder.pushed[1][0] > decoder.pushed[0][0]


async def test_versions_survive_restarts_and_clocks(serve: Any) -> None:
    """After a restart, even with a clock that went back, no pod is sent a lower version than it holds."""
    held: list[Version] = []
    table = None
    for wall_s in (2000.0, 3000.0, 1000.0, 1000.0):
        async with serve(wall_s) as served:
            served.apply()
            pod = PodClient(served.address, "d", "Decode", table=table)
            async with pod as decoder:
                await until(partial(all_pushed, [decoder], 1))
                served.apply(quality={"maxLossBasisPoints": 10})
                await until(partial(all_pushed, [decoder], 2))
                table = decoder.table
                held += [version for version, _ in decoder.pushed]
    assert held == sorted(set(held))
    assert len({version.epoch for version in held}) == 4


async def test_reports_become_a_table(served: Served) -> None:
    """Transfers that encode slower than profiled lead to a pushed table that says so."""
    served.apply()
    async with PodClient(served.address, "d", "Decode") as decoder:
        await until(lambda: decoder.table)
        slow = transfer_report("int4", native_bytes=10**8, wire_bytes=27_000_000, encode_s=0.5)
        await decoder.report(*[slow] * 50)
        served.ahead_s = 6.0

        def learned() -> bool:
            served.controller.tick()
            return len(decoder.pushed) > 1

        await until(learned)
        assert decoder.table is not None
        assert decoder.table.candidates["int4"].encode.seconds(10**8) > 0.3


async def test_stopping_controller_says_so(serve: Any) -> None:
    """A controller that ends on purpose ends its streams at once, and pods keep their tables."""
    async with AsyncExitStack() as stack:
        async with serve() as served:
            served.apply()
            decoder = await stack.enter_async_context(PodClient(served.address, "d", "Decode"))
            await until(lambda: decoder.table)
            began_s = time.monotonic()
        error = await decoder.ended(5)
        assert time.monotonic() - began_s < 1.5
        assert (error.code(), error.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "the controller is stopping",
        )
        assert decoder.table is not None


async def test_change_reaches_a_hundred_pods(served: Served) -> None:
    """A change is acknowledged by a hundred pods, producers after decoders, within two seconds."""
    served.apply()
    async with AsyncExitStack() as stack:
        pods = [
            await stack.enter_async_context(
                PodClient(served.address, f"pod{n}", "Decode" if n % 2 else "Prefill")
            )
            for n in range(100)
        ]
        await until(lambda: all(pod.table for pod in pods))
        began_s = time.monotonic()
        served.apply(quality={"maxLossBasisPoints": 10})
        counts = served.controller.hub.counts
        await until(lambda: sum(c.synced for c in counts("default/chat").values()) == 100)
        assert time.monotonic() - began_s < 2.0
        last_decoder_s = max(pod.pushed[-1][1] for pod in pods if pod.role == "Decode")
        first_producer_s = min(pod.pushed[-1][1] for pod in pods if pod.role == "Prefill")
        assert first_producer_s >= last_decoder_s


async def test_nonsense_from_a_pod_harms_nobody(served: Served) -> None:
    """Answers to nothing, a second Hello, empty messages and absurd reports end nothing and change nothing."""
    served.apply()
    async with (
        PodClient(served.address, "d", "Decode") as bad,
        PodClient(served.address, "p", "Prefill") as good,
    ):
        await until(lambda: bad.table and good.table)
        table = good.table
        for _ in range(50):
            await bad.send(ack=pb.Ack(nonce="none", version=pb.Version(epoch=2**64 - 1)))
            await bad.send(nack=pb.Nack(nonce="1", reason="x" * 1000, detail="y" * 10_000))
            await bad.send(hello=pb.Hello(pod="other", role="Prefill"))
            await bad.send()
            await bad.report(pb.TransferReport(), transfer_report("\x00", encode_s=-1e300))
        await asyncio.sleep(0.1)
        served.controller.tick()
        assert (good.table, len(good.pushed), bad.error) == (table, 1, None)
        assert list(served.controller.hub.sessions) == ["default/d", "default/p"]
        served.apply(quality={"maxLossBasisPoints": 10})
        await until(partial(all_pushed, [bad, good], 2))


async def test_heartbeats_arrive(served: Served) -> None:
    """A pod with nothing new hears from the controller three times within its table's time to live."""
    served.apply(control={"failsafe": {"leaseSeconds": 5}})
    async with PodClient(served.address, "d", "Decode") as decoder:
        await until(lambda: decoder.table)
        await until(lambda: len(decoder.heartbeats) >= 1, 3)
        assert decoder.heartbeats == [decoder.pushed[0][0]]
        assert version_from_message(pb.Version()) != decoder.heartbeats[0]


class Deaf:
    """The context of a stream whose pod says Hello and then takes nothing in: it stands for a full window."""

    def __init__(self) -> None:
        self.aborted: list[tuple[grpc.StatusCode, str]] = []
        self._said = False

    def invocation_metadata(self) -> tuple[()]:
        """Return none."""
        return ()

    async def send_initial_metadata(self, _metadata: object) -> None:
        """Send them."""

    async def read(self) -> pb.PodMessage:
        """Return the Hello, then nothing for ever."""
        if self._said:
            await asyncio.Event().wait()
        self._said = True
        hello = pb.Hello(pod="d", role="Decode", labels={"app": "chat-decode"})
        return pb.PodMessage(hello=hello)

    async def write(self, _message: object) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        """Take note."""
        self.aborted.append((code, details))


async def test_pod_that_takes_nothing_in_loses_its_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that finds no way to its pod ends the stream after a while, and the pod is gone."""
    monkeypatch.setattr(service, "SEND_TIMEOUT_S", 0.05)
    served.apply()
    hub, context = served.controller.hub, Deaf()
    streams = service.ControlService(
        hub,
        on_hello=lambda _: None,
        on_reports=lambda *_: None,
        on_decisions=lambda *_: None,
        on_refused=lambda _: None,
    )
    async with asyncio.timeout(5):
        await streams.Connect(None, context)
    assert context.aborted == [(grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was read for 0.05 s")]
    assert hub.sessions == {}
