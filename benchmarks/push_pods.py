"""Many serving pods' ends of the control channel in one process, for `bench_push`.

Each pod has a TCP connection and a stream of its own, says Hello, acknowledges every table at once, reports a
transfer a second, and reconnects as the connector does. Commands come as words on standard input: ``drop`` ends all
streams at once, ``stick`` has the first Decode pod answer nothing any more, ``quit`` ends the process. Events go as
JSON lines to standard output.
"""

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import uvloop

from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.control_pb2_grpc import ControlStub

OPTIONS: Final = (
    # otherwise all channels of a process would share one connection
    ("grpc.use_local_subchannel_pool", 1),
    # as the connector has it
    ("grpc.http2.bdp_probe", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What all pods of the process have in common.

    Attributes:
        address: Of the controller.
        first_backoff_s: The connector's backoff after the first failure.
        last_backoff_s: Its longest.
        report_every_s: How often each pod reports a transfer; 0 for never.
    """

    address: str
    first_backoff_s: float
    last_backoff_s: float
    report_every_s: float


class Pod:
    """One pod.

    Attributes:
        held: The version it holds.
        lowered: How often it was pushed a lower version than it held.
        stuck: It answers nothing any more.
    """

    def __init__(self, fleet: "Fleet", name: str, role: str) -> None:
        self.held: Version | None = None
        self.lowered = 0
        self.stuck = False
        self._fleet = fleet
        self._name = name
        self._role = role
        self._call: Any = None
        # gRPC takes one message of a stream at a time
        self._writing = asyncio.Lock()
        self._report_message: pb.PodMessage | None = None

    @property
    def decodes(self) -> bool:
        """Whether it is a Decode pod."""
        return self._role == "Decode"

    def drop(self) -> None:
        """End the stream at once."""
        if self._call is not None:
            self._call.cancel()

    async def run(self) -> None:
        """Keep a stream open."""
        settings = self._fleet.settings
        backoff_s = settings.first_backoff_s
        while True:
            began_s = time.monotonic()
            try:
                async with grpc.aio.insecure_channel(settings.address, options=OPTIONS) as channel:
                    await self._session(channel)
            except asyncio.CancelledError:
                if self._fleet.closed:
                    return
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
                # the last two are a write that came when the stream had just ended
                pass
            self._fleet.lost(self)
            if time.monotonic() - began_s > 1.0:
                backoff_s = settings.first_backoff_s
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(2 * backoff_s, settings.last_backoff_s)

    async def _session(self, channel: grpc.aio.Channel) -> None:
        self._call = call = ControlStub(channel).Connect()  # type: ignore[no-untyped-call]
        hello = pb.Hello(
            pod=self._name, namespace="default", role=self._role, labels={"app": self._role.lower()}
        )
        if self.held is not None:
            hello.version.epoch, hello.version.counter = self.held
        await call.write(pb.PodMessage(hello=hello))
        reporter = asyncio.create_task(self._report(call))
        try:
            async for message in call:
                if message.WhichOneof("body") == "push" and not self.stuck:
                    await self._take(call, message.push)
        finally:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)

    async def _write(self, call: Any, message: pb.PodMessage) -> None:
        async with self._writing:
            await call.write(message)

    async def _take(self, call: Any, push: pb.Push) -> None:
        version = push.version.epoch, push.version.counter
        if self.held is not None and version < self.held:
            self.lowered += 1
        self.held = version
        self._report_message = _report_of(push.table.candidates[0])
        await self._write(call, pb.PodMessage(ack=pb.Ack(version=push.version, nonce=push.nonce)))
        self._fleet.acknowledged(self, version)

    async def _report(self, call: Any) -> None:
        every_s = self._fleet.settings.report_every_s
        if not every_s:
            return
        await asyncio.sleep(random.uniform(0, every_s))
        while True:
            if self._report_message is not None:
                await self._write(call, self._report_message)
            await asyncio.sleep(every_s)


def _report_of(candidate: Any) -> pb.PodMessage:
    """Return a report that tells nothing new of a profile, so that the tables change only as the benchmark wants."""
    native = 30_000_000
    encode_s, decode_s = (
        cost.offset_s + (native / cost.bytes_per_s if cost.bytes_per_s else 0.0)
        for cost in (candidate.encode, candidate.decode)
    )
    report = pb.TransferReport(
        workload="default",
        profile=candidate.name,
        wanted=candidate.name,
        native_bytes=native,
        wire_bytes=int(native / candidate.ratio),
        encode_s=max(encode_s, candidate.encode.floor_s),
        wire_s=0.1,
        decode_s=max(decode_s, candidate.decode.floor_s),
        total_s=0.5,
        predicted_s=0.5,
        goodput_bytes_per_s=3e8,
    )
    return pb.PodMessage(reports=pb.TransferReports(reports=[report]))


class Fleet:
    """All pods of the process.

    Attributes:
        settings: What they have in common.
        pods: They.
        stuck: How many of them answer nothing any more.
        closed: They are to end.
    """

    def __init__(self, settings: Settings, names: list[tuple[str, str]]) -> None:
        self.settings = settings
        self.stuck = 0
        self.closed = False
        self.pods = [Pod(self, name, role) for name, role in names]
        self._acked: dict[Version, dict[Pod, float]] = {}

    def acknowledged(self, pod: Pod, version: Version) -> None:
        """Take note of an answer; when all pods have given it, say so."""
        answers = self._acked.setdefault(version, {})
        answers[pod] = time.time()
        if len(answers) == len(self.pods) - self.stuck:
            _say(
                event="all",
                version=version,
                last_s=max(answers.values()),
                lowered=sum(pod.lowered for pod in self.pods),
            )

    def lost(self, pod: Pod) -> None:
        """Take note that a pod's stream ended: what it answered must be answered anew."""
        for answers in self._acked.values():
            answers.pop(pod, None)

    async def run(self) -> None:
        """Serve commands until told to quit."""
        tasks = [asyncio.create_task(pod.run()) for pod in self.pods]
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while (command := (await reader.readline()).decode().strip()) not in ("quit", ""):
            match command:
                case "drop":
                    for pod in self.pods:
                        pod.drop()
                case "stick":
                    next(pod for pod in self.pods if pod.decodes).stuck = True
                    self.stuck += 1
        self.closed = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    """Run a fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--pods", type=int, required=True)
    parser.add_argument("--name", required=True, help="prefix of the pods' names")
    parser.add_argument("--backoff", type=float, nargs=2, required=True)
    parser.add_argument("--report-every", type=float, default=1.0)
    options = parser.parse_args()
    first_s, last_s = options.backoff
    settings = Settings(options.address, first_s, last_s, options.report_every)
    names = [
        (f"{options.name}-{number}", "Decode" if number % 2 else "Prefill")
        for number in range(options.pods)
    ]
    # a thousand pods share this process; each has its own collector in truth
    gc.freeze()
    uvloop.run(Fleet(settings, names).run())


if __name__ == "__main__":
    main()
