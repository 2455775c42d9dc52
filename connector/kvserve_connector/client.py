"""The consumer's side of transfers: pulls a request's KV into the engine's cache, or says why not."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

from kvserve_api.errors import KVServeError, TransferError, TransferReason, WireError, WireReason
from kvserve_api.telemetry import (
    ATTR_NATIVE_BYTES,
    ATTR_PROFILE,
    ATTR_TABLE_VERSION,
    ATTR_WIRE_BYTES,
    ATTR_WORKLOAD,
    SPAN_TRANSFER,
)
from kvserve_connector import tracing
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.carriers import Receiver, TcpReceiver
from kvserve_connector.chunks import check_form
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.commands import MAX_RENEWED, PARTS, PROBES, Pull, Release, Renew
from kvserve_connector.config import NIXL, ConnectorConfig
from kvserve_connector.connections import Connections
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Gate
from kvserve_connector.handover import Load
from kvserve_connector.intake import Intake, receive_message
from kvserve_connector.outcome import Outcome
from kvserve_connector.probing import take_padding
from kvserve_connector.protocol import HEADER_BYTES, Kind, pack_header
from kvserve_connector.remote import Remote
from kvserve_connector.renewals import SHARE_OF_LEASE, Renewals
from kvserve_connector.replies import Accept, End
from kvserve_connector.staged import StagedReceiver
from kvserve_connector.staging import Reader

logger = logging.getLogger(__name__)

MAX_PULLS: Final = 8
"""Transfers under way at once; more wait their turn."""
MAX_EARLY: Final = 64
"""Likewise, of those that wait for their prefill. They have threads of their own: a prefill may itself wait for the
room of one whose transfer would wait behind it."""


@dataclass(slots=True)
class _Active:
    """A transfer that may be cancelled."""

    cancelled: bool = False
    asked_s: float = 0.0
    frames: FrameSocket | None = None
    futures: list[Future[float]] = field(default_factory=list)


class TransferClient:
    """Pulls transfers in threads of its own.

    When a transfer's outcome is reported, nothing of it will write into the cache any more.

    Args:
        config: The connector's settings.
        cache: The engine's KV cache.
        stages: Ids of the stages that can be decoded here.
        bundles: The calibration bundles that blobs may be decoded with.
        coders: Threads that decode and write the cache.
        report: Takes each outcome, in a thread of the client's.

    Attributes:
        reader: What reads chunks by NIXL; None without it.
        decode_delays: How many requests of the engine a second of decoding delays by a second now.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        cache: EngineCache,
        stages: frozenset[str],
        bundles: BundleBook,
        coders: Executor,
        report: Callable[[Outcome], None],
    ) -> None:
        self._config = config
        self._form = cache.form
        self._wishes = stages | {PARTS, PROBES}
        self._bundles = bundles
        self._report = report
        self._intake = Intake(ChunkCoder(cache.form, bundles.find), cache, coders)
        self._connections = Connections(Gate(config))
        self.decode_delays = 0.0
        self.reader = Reader(config.staging_bytes) if config.transport == NIXL else None
        self._told_of_tcp = False
        self._pulls = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="kvserve-pull")
        self._early = ThreadPoolExecutor(MAX_EARLY, thread_name_prefix="kvserve-early")
        self._lock = threading.Lock()
        self._active: dict[str, _Active] = {}
        self._renewals = Renewals(config.lease_s * SHARE_OF_LEASE, self._renew)

    def expect(self, remote: Remote) -> None:
        """Keep a prefill's lease alive until it is fetched or released; its request has arrived."""
        self._renewals.add(remote)

    def start(self, load: Load) -> None:
        """Begin a transfer."""
        # it may have to wait its turn
        self._renewals.add(load.remote)
        active = _Active()
        with self._lock:
            self._active[load.request_id] = active
        deadline_s = time.monotonic() + self._config.timeout_s
        if load.remote.transfer:
            deadline_s += self._config.prefill_timeout_s
        threads = self._early if load.remote.transfer else self._pulls
        threads.submit(self._run, load, active, deadline_s)

    @property
    def busy(self) -> bool:
        """Whether a transfer is under way, or waits for its turn."""
        return bool(self._active)

    def cancel(self, request_id: str) -> None:
        """Stop a transfer soon; its outcome is still reported."""
        with self._lock:
            active = self._active.get(request_id)
            if active is not None:
                active.cancelled = True
                if active.frames is not None:
                    active.frames.interrupt()

    def release(self, remote: Remote) -> None:
        """Tell a producer that nobody will fetch a prefill; if that fails, its lease ends by itself."""
        self._renewals.drop(remote)
        self._pulls.submit(self._release, remote)

    def close(self) -> None:
        """Stop everything."""
        with self._lock:
            for active in self._active.values():
                active.cancelled = True
                if active.frames is not None:
                    active.frames.interrupt()
        self._renewals.close()
        for threads in (self._pulls, self._early):
            threads.shutdown(wait=False, cancel_futures=True)
        self._connections.close()

    def _run(self, load: Load, active: _Active, deadline_s: float) -> None:
        outcome = Outcome(load=load, native_bytes=self._form.native_bytes(load.tokens))
        started_s = time.monotonic()
        asking: FrameSocket | None = None
        try:
            with tracing.span(SPAN_TRANSFER, load.remote.traceparent) as span:
                try:
                    asking = self._pull(load, active, outcome, deadline_s)
                finally:
                    span.set_attribute(ATTR_WORKLOAD, load.workload)
                    span.set_attribute(ATTR_NATIVE_BYTES, outcome.native_bytes)
                    span.set_attribute(ATTR_WIRE_BYTES, outcome.wire_bytes)
                    if outcome.accept is not None:
                        span.set_attribute(ATTR_PROFILE, outcome.accept.profile)
                        span.set_attribute(ATTR_TABLE_VERSION, str(outcome.accept.version))
        except KVServeError as error:
            outcome.failure, outcome.detail = error.reason, str(error)
        except MemoryError as error:
            outcome.failure, outcome.detail = TransferReason.OUT_OF_MEMORY, str(error)
        except Exception as error:
            # whatever it was, the request must not wait for ever: it is recomputed
            logger.exception("transfer of %s failed", load.request_id)
            outcome.failure, outcome.detail = KVServeError.reason, str(error)
        if outcome.failure and active.cancelled:
            outcome.failure = TransferReason.CANCELLED
        ended_s = time.monotonic()
        outcome.total_s = outcome.exposed_s = ended_s - started_s
        if (end := outcome.end) is not None:
            outcome.total_s = max(0.0, outcome.total_s - end.waited_s)
            # the producer's clock shows another time; how long the prefill went on does not depend on it
            asked_s = active.asked_s if end.prefill_s else started_s
            exposed_s = max(0.0, ended_s - asked_s - end.prefill_s)
            outcome.exposed_s = min(outcome.total_s, exposed_s)
        self._renewals.drop(load.remote)
        with self._lock:
            self._active.pop(load.request_id, None)
        self._report(outcome)
        if asking is not None:
            self._take_probe(load.remote, asking)

    def _take_probe(self, remote: Remote, frames: FrameSocket) -> None:
        """Let a producer find out how fast the link is, and keep the connection."""
        try:
            take_padding(frames)
        except KVServeError as error:
            logger.info("no probe of the link from %s:%d: %s", remote.host, remote.port, error)
            frames.close()
        else:
            self._connections.keep(remote, frames)

    def _pull(
        self, load: Load, active: _Active, outcome: Outcome, deadline_s: float
    ) -> FrameSocket | None:
        """Do the transfer; a connection that is returned is one over which the producer wishes to probe the link."""
        frames, accept = self._ask(load, active, deadline_s)
        self._renewals.drop(load.remote)
        outcome.accept = accept
        received_before = frames.received_bytes
        receiver: Receiver | None = None
        try:
            check_form(accept.chunks, self._form, load.tokens)
            receiver = self._receiver(frames, accept, load.remote)
            outcome.transport = receiver.name
            self._intake.receive(frames, accept, receiver, outcome, active.futures)
            outcome.end = End.parse(receive_message(frames, Kind.END))
            if load.remote.transfer:
                outcome.accept = replace(accept, model_s=outcome.end.model_s)
            frames.send(pack_header(Kind.DONE, 0))
            outcome.wire_bytes = frames.received_bytes - received_before
            self._intake.finish(outcome, active.futures)
        except BaseException:
            outcome.wire_bytes = frames.received_bytes - received_before
            frames.close()
            raise
        finally:
            if receiver is not None:
                receiver.close()
            # before the outcome is known to anyone, every write into the cache has ended
            for future in active.futures:
                if not future.cancel():
                    future.exception()
            with self._lock:
                active.frames = None
        if outcome.end.probe:
            return frames
        self._connections.keep(load.remote, frames)
        return None

    def _ask(self, load: Load, active: _Active, deadline_s: float) -> tuple[FrameSocket, Accept]:
        """Ask for the KV and return the promise; a kept connection that turns out dead is replaced once."""
        remote = load.remote
        kept = self._connections.take(remote)
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransferError(TransferReason.TIMEOUT, "waited too long for its turn")
            frames = kept or self._connections.connect(remote, left_s)
            with self._lock:
                active.frames = frames
                cancelled = active.cancelled
            received_before = frames.received_bytes
            if cancelled:
                frames.interrupt()
            try:
                frames.set_budget(left_s)
                wish = self._wish(load, left_s).pack()
                active.asked_s = time.monotonic()
                frames.send(wish)
                frames.bind(wish[HEADER_BYTES:])
                return frames, Accept.parse(receive_message(frames, Kind.ACCEPT))
            except TransferError as error:
                frames.close()
                stale = kept is not None and frames.received_bytes == received_before
                if not (stale and error.reason == TransferReason.PEER_LOST) or active.cancelled:
                    raise
                kept = None
            except BaseException:
                frames.close()
                raise

    def _wish(self, load: Load, left_s: float) -> Pull:
        return Pull(
            engine_id=load.remote.engine_id,
            request_id=load.remote.request_id,
            tokens=load.tokens,
            prompt_digest=load.prompt_digest,
            fingerprint=self._form.fingerprint,
            layout=self._form.layout,
            blocks=self._form.blocks,
            stages=self._wishes,
            bundles=self._bundles.ready,
            budget_s=left_s,
            traceparent=tracing.traceparent(),
            transfer=load.remote.transfer,
            rank=self._form.rank,
            ranks=self._form.ranks,
            nixl=self.reader is not None and self.reader.ready,
            decode_delays=self.decode_delays,
        )

    def _receiver(self, frames: FrameSocket, accept: Accept, remote: Remote) -> Receiver:
        if accept.nixl is None:
            self._tell_of_tcp(remote)
            return TcpReceiver(frames)
        if self.reader is None:
            raise WireError(
                WireReason.MALFORMED, "the producer offers NIXL, which was not asked for"
            )
        return StagedReceiver(frames, self.reader, accept.nixl, self._config.stall_s)

    def _tell_of_tcp(self, remote: Remote) -> None:
        """Say once that a producer does not have what was wished for."""
        if self.reader is not None and self.reader.ready and not self._told_of_tcp:
            self._told_of_tcp = True
            logger.warning(
                'the producer at %s:%d sends over TCP: give it "transport": "nixl" too',
                remote.host,
                remote.port,
            )

    def _release(self, remote: Remote) -> None:
        message = Release(
            engine_id=remote.engine_id, request_id=remote.request_id, transfer=remote.transfer
        )
        self._connections.say(remote, [message.pack()], self._config.stall_s)

    def _renew(self, remotes: Sequence[Remote]) -> None:
        """Tell a producer that its prefills are still wanted; if that fails, there is a next time."""
        names = tuple(remote.request_id for remote in remotes)
        messages = [
            Renew(names=names[start : start + MAX_RENEWED]).pack()
            for start in range(0, len(names), MAX_RENEWED)
        ]
        limit_s = min(self._config.stall_s, self._config.lease_s)
        self._connections.say(remotes[0], messages, limit_s)
