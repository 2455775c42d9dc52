"""The gRPC service: one bidirectional stream a pod, read and written as the hub decides."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from kvserve_api.credentials import Credentials
from kvserve_api.errors import (
    KVServeError,
    PolicyError,
    SpecError,
    UnauthenticatedError,
    UnavailableError,
)
from kvserve_api.rpc import control_pb2_grpc
from kvserve_api.rpc.auth import ControllerSide
from kvserve_api.table import Version
from kvserve_controller.alarm import Alarm
from kvserve_controller.match import Pod
from kvserve_controller.push import Hub
from kvserve_controller.session import Ending, Session

HELLO_TIMEOUT_S: Final = 10.0
SEND_TIMEOUT_S: Final = 5.0
"""How long a message may wait for a pod that doesn't read before its stream is closed."""

_EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs don't know it

log = logging.getLogger(__name__)

Context: TypeAlias = Any
"""A ``grpc.aio.ServicerContext``; its stubs know no coroutine that reads."""


class ControlService(control_pb2_grpc.ControlServicer):
    """Carries messages between the streams and the hub.

    A stuck pod holds up its own stream only: each has a reader and a writer of its own, and each wait has an end.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        on_hello: Callable[[Version], None],
        on_reports: Callable[[str, str, Sequence[Any]], None],
        on_decisions: Callable[[str, str, Sequence[Any]], None],
        on_refused: Callable[[str], None],
        credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the service.

        Args:
            hub: Decides who is sent what.
            on_hello: Called with the version a pod holds; raises SpecError for one that can't be.
            on_reports: Called with a policy, one of its pods and the pod's ``TransferReport`` messages.
            on_decisions: Called with the same and the pod's ``Decision`` messages.
            on_refused: Called with the reason when a stream is refused.
            credentials: What pods must prove; None believes everybody.
            clock: Monotonic seconds.
        """
        self._hub = hub
        self._on_hello = on_hello
        self._on_reports = on_reports
        self._on_decisions = on_decisions
        self._on_refused = on_refused
        self._credentials = credentials
        self._clock = clock

    async def Connect(self, request_iterator: Any, context: Context) -> None:  # noqa: N802
        """Serve one pod until either side ends the stream."""
        try:
            session = self._hub.connect(await self._hello(context))
        except KVServeError as error:
            self._on_refused(error.reason)
            if isinstance(error, UnauthenticatedError):
                log.warning("pod turned away", extra={"peer": context.peer(), "why": str(error)})
            await context.abort(_code_of(error), str(error))
        pod = session.pod
        log.info(
            "pod connected", extra={"pod": pod.key, "role": pod.role, "policy": session.policy}
        )
        tasks = [
            asyncio.create_task(self._read(session, context)),
            asyncio.create_task(self._write(session, context)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # first of all: other pods may be waiting for this one
            self._hub.disconnect(session)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("stream failed", exc_info=result, extra={"pod": pod.key})
            log.info("pod disconnected", extra={"pod": pod.key, "why": _why(session)})
        if session.ending is not None:
            ending, detail = session.ending
            await context.abort(grpc.StatusCode[ending.value], detail)

    async def _hello(self, context: Context) -> Pod:
        secrets = () if self._credentials is None else self._credentials.current().secrets
        side = ControllerSide.begin(secrets, context.invocation_metadata())
        await context.send_initial_metadata(side.metadata)
        try:
            message = await asyncio.wait_for(context.read(), HELLO_TIMEOUT_S)
        except TimeoutError:
            message = _EOF
        if message is _EOF or message.WhichOneof("body") != "hello":
            raise SpecError("hello", f"must be the first message, within {HELLO_TIMEOUT_S:g} s")
        side.check(message.hello.proof)
        pod = Pod.read(message.hello)
        if pod.version is not None:
            self._on_hello(pod.version)
        return pod

    async def _read(self, session: Session, context: Context) -> None:
        while (message := await context.read()) is not _EOF:
            match message.WhichOneof("body"):
                case "ack":
                    self._hub.answer(session, message.ack.nonce, None)
                case "nack":
                    nack = message.nack
                    log.warning(
                        "table refused",
                        extra={"pod": session.pod.key, "why": nack.reason, "detail": nack.detail},
                    )
                    self._hub.answer(session, nack.nonce, (nack.reason, nack.detail))
                case "reports" if session.policy is not None:
                    self._on_reports(session.policy, session.pod.name, message.reports.reports)
                case "decisions" if session.policy is not None:
                    made = message.decisions.decisions
                    self._on_decisions(session.policy, session.pod.name, made)
                case _:
                    log.debug("message ignored", extra={"pod": session.pod.key})

    async def _write(self, session: Session, context: Context) -> None:
        loop = asyncio.get_running_loop()
        writer = asyncio.current_task()
        assert writer is not None

        def give_up() -> None:
            session.end(Ending.SILENT, f"nothing was read for {SEND_TIMEOUT_S:g} s")
            writer.cancel()

        alarm = Alarm(session.wake.set)
        try:
            while session.ending is None:
                session.wake.clear()
                now_s = self._clock()
                message = self._hub.next_message(session, now_s)
                if message is not None:
                    timer = loop.call_later(SEND_TIMEOUT_S, give_up)
                    try:
                        await context.write(message)
                    finally:
                        timer.cancel()
                elif session.ending is None:
                    alarm.set(self._hub.wait_s(session, now_s))
                    await session.wake.wait()
        finally:
            alarm.stop()


def _code_of(error: KVServeError) -> grpc.StatusCode:
    match error:
        case UnauthenticatedError():
            return grpc.StatusCode.UNAUTHENTICATED
        case UnavailableError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case PolicyError():
            return grpc.StatusCode.FAILED_PRECONDITION
        case SpecError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case _:
            return grpc.StatusCode.INTERNAL


def _why(session: Session) -> str:
    return session.ending[1] if session.ending is not None else "the stream ended"
