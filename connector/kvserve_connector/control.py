"""The pod's end of the control channel: takes decision tables, answers them, and reports transfers.

It runs in a thread of its own, and nothing in a request's path waits for it: without a controller the last table holds,
without a table everything is sent raw.
"""

import asyncio
import contextlib
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import grpc

from kvserve_api.credentials import Credentials
from kvserve_api.errors import KVServeError, UnauthenticatedError, UnavailableError
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.auth import PodSide
from kvserve_api.rpc.messages import decision_to_message, table_from_push, version_from_message
from kvserve_connector.bundles import BundleBook, wanted_by
from kvserve_connector.channel import Call, explain, open_channel, prove
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.control_messages import Identity, hello_message, nack_message, report_message
from kvserve_connector.outcome import Outcome
from kvserve_connector.ready import Carries, ReadyTable, carries_all
from kvserve_connector.selector import Selector

logger = logging.getLogger(__name__)

STALE_VERSION: Final = "StaleVersion"
MAX_REPORTS: Final = 1000
"""Reports kept for a controller that is not there; then the oldest go."""
REPORT_EVERY_S: Final = 1.0
FIRST_BACKOFF_S: Final = 0.2
LAST_BACKOFF_S: Final = 5.0
ANSWER_S: Final = 25.0
"""After this time a table that is still not ready is refused for now; the controller would end the stream at 30 s."""
HEALTHY_S: Final = 10.0
"""A stream that lived as long starts the backoff anew."""


class ControlClient:
    """Keeps one stream to the controller open, for as long as the engine lives.

    Args:
        config: The connector's settings; without a ``control_endpoint`` this client does nothing.
        identity: What to say in the Hello.
        selector: Where tables are put in force.
        dropped: Takes the number of reports that found no room.
        bundles: Where the calibration bundles of tables come from.
        warm_up: Makes a new table's pipelines fast before it is acknowledged.
        carries: Tells of a pipeline whether it may code this engine's cache.
        failed: Takes the reason for which a stream ended or did not come about.

    Raises:
        SpecError: A credential file can't be used.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        identity: Identity,
        selector: Selector,
        dropped: Callable[[int], None],
        bundles: BundleBook,
        warm_up: Callable[[ReadyTable], None],
        carries: Carries = carries_all,
        failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._config = config
        self._credentials = (
            Credentials(config.credentials, PATH, serves=False) if config.credentials else None
        )
        self._failed = failed
        self._identity = identity
        self._selector = selector
        self._dropped = dropped
        self._bundles = bundles
        self._warm_up = warm_up
        self._carries = carries
        self._reports: deque[pb.TransferReport] = deque(maxlen=MAX_REPORTS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._building = threading.Lock()
        self._installing = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="kvserve-control", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        if self._config.control_endpoint is not None:
            self._thread.start()

    def close(self) -> None:
        """End the stream and the thread."""
        if self._thread.is_alive() and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=5)

    def report(self, outcome: Outcome) -> None:
        """Queue a transfer's report; never waits, the oldest makes room."""
        if self._config.control_endpoint is None:
            return
        if len(self._reports) == MAX_REPORTS:
            self._dropped(1)
        self._reports.append(report_message(outcome))

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        assert self._config.control_endpoint is not None
        self._loop = loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while not self._stop.is_set():
            started_s = loop.time()
            try:
                async with open_channel(
                    self._config.control_endpoint, self._credentials
                ) as channel:
                    await self._session(channel)
            except (grpc.aio.AioRpcError, UnauthenticatedError) as error:
                failure = explain(error)
                self._failed(failure.reason)
                # what passes by itself is no warning
                passes = failure.reason == UnavailableError.reason
                logger.log(
                    logging.INFO if passes else logging.WARNING,
                    "control channel ended: %s: %s", failure.reason, failure,
                )  # fmt: skip
            except Exception:
                logger.exception("control channel failed")
            if loop.time() - started_s > HEALTHY_S:
                backoff_s = FIRST_BACKOFF_S
            with contextlib.suppress(TimeoutError):
                # jitter only: which pod comes first after a controller's restart must differ
                await asyncio.wait_for(self._stop.wait(), backoff_s * random.uniform(0.5, 1.5))
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    async def _session(self, channel: grpc.aio.Channel) -> None:
        """Hold one stream until it ends."""
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
        loaded = None if self._credentials is None else self._credentials.current()
        side = PodSide.begin(() if loaded is None else loaded.secrets)
        call: Call = stub.Connect(metadata=side.metadata)
        stop = asyncio.ensure_future(self._stop.wait())
        talk = asyncio.ensure_future(self._talk(call, side))
        try:
            await asyncio.wait({stop, talk}, return_when=asyncio.FIRST_COMPLETED)
            if talk.done():
                await talk
        finally:
            call.cancel()
            for task in (stop, talk):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await task

    async def _talk(self, call: Call, side: PodSide) -> None:
        """Say Hello to a controller that has proven itself, then listen and answer."""
        proof = await prove(call, side)
        table = self._selector.table
        version = None if table is None else table.version
        hello = hello_message(self._config, self._identity, version, proof)
        answers: asyncio.Queue[pb.PodMessage] = asyncio.Queue(maxsize=16)
        writer = asyncio.ensure_future(self._write(call, hello, answers))
        try:
            await self._read(call, answers)
        finally:
            writer.cancel()
            # why a stream ended is what the reader is told
            with contextlib.suppress(
                asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.AioRpcError
            ):
                await writer

    async def _write(
        self, call: Call, hello: pb.Hello, answers: "asyncio.Queue[pb.PodMessage]"
    ) -> None:
        await call.write(pb.PodMessage(hello=hello))
        async for message in self._outgoing(answers):
            await call.write(message)

    async def _outgoing(
        self, answers: "asyncio.Queue[pb.PodMessage]"
    ) -> AsyncIterator[pb.PodMessage]:
        """Yield answers as they come and reports once in a while."""
        while True:
            try:
                yield await asyncio.wait_for(answers.get(), REPORT_EVERY_S)
            except TimeoutError:
                if self._reports:
                    batch = [self._reports.popleft() for _ in range(len(self._reports))]
                    yield pb.PodMessage(reports=pb.TransferReports(reports=batch))
                made = self._selector.decisions
                if made:
                    taken = [decision_to_message(made.popleft()) for _ in range(len(made))]
                    yield pb.PodMessage(decisions=pb.Decisions(decisions=taken))

    async def _read(self, call: Call, answers: "asyncio.Queue[pb.PodMessage]") -> None:
        abandoned = threading.Event()
        applying: set[asyncio.Task[None]] = set()
        try:
            async for message in call:
                match message.WhichOneof("body"):
                    case "push":
                        abandoned.set()
                        abandoned = threading.Event()
                        # fetching bundles and compiling code take a while; meanwhile the stream stays alive
                        task = asyncio.create_task(self._answer(message.push, answers, abandoned))
                        applying.add(task)
                        task.add_done_callback(applying.discard)
                    case "heartbeat":
                        self._selector.renew(version_from_message(message.heartbeat.version))
                    case "release":
                        logger.info("no policy applies to this pod: %s", message.release.reason)
                        with self._installing:
                            abandoned.set()
                            self._selector.drop()
                    case _:
                        pass
        finally:
            # a table of this stream must not come into force when the next one has begun
            with self._installing:
                abandoned.set()
            for task in applying:
                task.cancel()

    async def _answer(
        self,
        push: pb.Push,
        answers: "asyncio.Queue[pb.PodMessage]",
        abandoned: threading.Event,
    ) -> None:
        applying = asyncio.create_task(asyncio.to_thread(self._apply, push, abandoned))
        done, _ = await asyncio.wait({applying}, timeout=ANSWER_S)
        if not done:
            # what is built by then is kept: the table comes again, and is faster
            with self._installing:
                abandoned.set()
            applying.add_done_callback(lambda task: task.cancelled() or task.exception())
            version = version_from_message(push.version)
            logger.warning("table %s takes long to make ready", version)
            await answers.put(nack_message(push, UnavailableError.reason, "still being made ready"))
        elif (answer := applying.result()) is not None:
            await answers.put(answer)

    def _apply(self, push: pb.Push, abandoned: threading.Event) -> pb.PodMessage | None:
        """Put a pushed table in force, and return the answer to it; None if nobody waits for one any more."""
        version = version_from_message(push.version)
        current = self._selector.table
        if current is not None and version < current.version:
            return nack_message(push, STALE_VERSION, f"version {current.version} is in force")
        try:
            table = table_from_push(push)
            bundles = self._bundles.obtain(wanted_by(table, self._carries), abandoned)
            # one after the other: the second finds what the first has built
            with self._building:
                ready = ReadyTable.of(table, bundles, self._carries)
                self._warm_up(ready)
        except KVServeError as error:
            logger.warning("table %s refused: %s", version, error)
            return nack_message(push, error.reason, str(error))
        except Exception as error:
            # a table that this pod stumbles over must be refused, not leave the controller waiting
            logger.exception("table %s refused", version)
            return nack_message(push, KVServeError.reason, str(error))
        with self._installing:
            if abandoned.is_set():
                return None
            # first what decodes, then the word that it may be sent
            self._bundles.keep(ready.bundles)
            self._selector.install(ready)
        logger.info("table %s of policy %s is in force", version, ready.table.policy)
        return pb.PodMessage(ack=pb.Ack(version=push.version, nonce=push.nonce))
