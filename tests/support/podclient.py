"""A serving pod's side of the control channel, for tests of the controller: a real gRPC client."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.control_pb2_grpc import ControlStub
from kvserve_api.rpc.messages import table_from_push, version_from_message, version_to_message
from kvserve_api.table import DecisionTable, Version


@dataclass
class PodClient:
    """One stream of one pod.

    Attributes:
        address: Of the controller.
        name: Of the pod.
        role: Prefill or Decode.
        hello: Further fields of its Hello.
        answer: What it says to a table: True is Ack, a reason is Nack, None is silence.
        table: What it holds.
        pushed: The versions it was sent, and when, by `time.monotonic`.
    """

    address: str
    name: str
    role: str
    hello: dict[str, Any] = field(default_factory=dict)
    answer: Callable[[pb.Push], bool | str | None] = lambda push: True
    table: DecisionTable | None = None
    pushed: list[tuple[Version, float]] = field(default_factory=list)
    heartbeats: list[Version] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    error: grpc.aio.AioRpcError | None = None

    async def __aenter__(self) -> "PodClient":
        """Connect and say Hello."""
        self._channel = grpc.aio.insecure_channel(self.address)
        self._call = ControlStub(self._channel).Connect()  # type: ignore[no-untyped-call]
        labels = self.hello.pop("labels", {"app": f"chat-{self.role.lower()}"})
        fields = {"namespace": "default", "labels": labels, **self.hello}
        version = self.table.version if self.table else fields.pop("version", None)
        if version is not None:
            fields["version"] = version_to_message(version)
        hello = pb.Hello(pod=self.name, role=self.role, **fields)
        self._writing = asyncio.Lock()
        await self._call.write(pb.PodMessage(hello=hello))
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""
        self._call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)

    async def send(self, **body: Any) -> None:
        """Send a message; one after the other, as a stream wants it."""
        async with self._writing:
            await self._call.write(pb.PodMessage(**body))

    async def report(self, *reports: pb.TransferReport) -> None:
        """Report transfers."""
        await self.send(reports=pb.TransferReports(reports=reports))

    async def until(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
        """Wait until something holds."""
        await until(condition, timeout_s)

    async def ended(self, timeout_s: float = 10.0) -> grpc.aio.AioRpcError:
        """Wait until the controller ends the stream and return how."""
        await until(lambda: self._reader.done(), timeout_s)
        assert self.error is not None, "the stream ended without an error"
        return self.error

    async def _read(self) -> None:
        try:
            async for message in self._call:
                match message.WhichOneof("body"):
                    case "push":
                        await self._take(message.push)
                    case "heartbeat":
                        self.heartbeats.append(version_from_message(message.heartbeat.version))
                    case "release":
                        self.table = None
                        self.releases.append(message.release.reason)
        except grpc.aio.AioRpcError as error:
            self.error = error

    async def _take(self, push: pb.Push) -> None:
        self.pushed.append((version_from_message(push.version), time.monotonic()))
        answer = self.answer(push)
        if answer is True:
            self.table = table_from_push(push)
            await self.send(ack=pb.Ack(version=push.version, nonce=push.nonce))
        elif isinstance(answer, str):
            nack = pb.Nack(version=push.version, nonce=push.nonce, reason=answer, detail="a test")
            await self.send(nack=nack)


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: It didn't in time.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    assert condition(), "did not happen in time"


def transfer_report(profile: str, **fields: Any) -> pb.TransferReport:
    """Return the report of a usual transfer of 10 MB."""
    usual: dict[str, Any] = {
        "workload": "default",
        "wanted": profile,
        "native_bytes": 10_000_000,
        "wire_bytes": 10_000_000,
        "encode_s": 0.01,
        "wire_s": 0.08,
        "decode_s": 0.01,
        "total_s": 0.1,
        "model_s": 0.2,
        "goodput_bytes_per_s": 125e6,
    }
    return pb.TransferReport(profile=profile, **(usual | fields))
