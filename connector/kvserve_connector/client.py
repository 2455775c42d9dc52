"""The consumer's side of transfers: pulls a request's KV into the engine's cache, or says why not."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from kvserve_api.errors import KVServeError, TransferError, TransferReason, WireError, WireReason
from kvserve_api.telemetry import (
    ATTR_NATIVE_BYTES,
    ATTR_PROFILE,
    ATTR_TABLE_VERSION,
    ATTR_WIRE_BYTES,
    ATTR_WORKLOAD,
    SPAN_DECODE,
    SPAN_TRANSFER,
    SPAN_WIRE,
)
from kvserve_connector import tracing
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.carriers import Receiver, TcpReceiver
from kvserve_connector.chunks import Chunk, check_form
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.commands import MAX_RENEWED, Pull, Release, Renew
from kvserve_connector.config import NIXL, TCP, ConnectorConfig
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Gate
from kvserve_connector.handover import Load
from kvserve_connector.protocol import HEADER_BYTES, Kind, pack_header
from kvserve_connector.remote import Remote
from kvserve_connector.renewals import SHARE_OF_LEASE, Renewals
from kvserve_connector.replies import Accept, End, Refuse
from kvserve_connector.staged import StagedReceiver
from kvserve_connector.staging import Reader

logger = logging.getLogger(__name__)

MAX_PULLS: Final = 8
"""Transfers under way at once; more wait their turn."""
MAX_EARLY: Final = 64
"""Likewise, of those that wait for their prefill. They have threads of their own: a prefill may itself wait for the
room of one whose transfer would wait behind it."""
MAX_IDLE: Final = 16
"""Connections kept open for the next transfer."""
BEHIND: Final = 2
"""Chunks that may wait to be decoded: then no more are received, and TCP holds the producer back."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How one transfer went.

    Attributes:
        load: What was wanted.
        accept: What the producer promised; None if it came to no promise.
        end: What the producer said at its end.
        native_bytes: Native KV bytes.
        wire_bytes: Bytes received, headers included.
        wire_s: Seconds in which bytes of chunks were arriving.
        decode_s: Seconds of decoding and writing into the cache.
        transport: What carried the chunks.
        total_s: From the start to the last write, without what the producer waited for the prefill.
        failure: Empty, or the reason why the request must be recomputed.
        detail: More about the failure, for people.
    """

    load: Load
    accept: Accept | None = None
    end: End | None = None
    native_bytes: int = 0
    wire_bytes: int = 0
    wire_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    transport: str = TCP
    failure: str = ""
    detail: str = ""


@dataclass(slots=True)
class _Active:
    """A transfer that may be cancelled."""

    cancelled: bool = False
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
        self._cache = cache
        self._form = cache.form
        self._stages = stages
        self._bundles = bundles
        self._coders = coders
        self._report = report
        self._coder = ChunkCoder(cache.form, bundles.find)
        self._gate = Gate(config)
        self.decode_delays = 0.0
        self.reader = Reader(config.staging_bytes) if config.transport == NIXL else None
        self._told_of_tcp = False
        self._pulls = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="kvserve-pull")
        self._early = ThreadPoolExecutor(MAX_EARLY, thread_name_prefix="kvserve-early")
        self._lock = threading.Lock()
        self._active: dict[str, _Active] = {}
        self._idle: deque[tuple[str, int, FrameSocket]] = deque()
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
        while self._idle:
            self._idle.popleft()[2].close()

    def _run(self, load: Load, active: _Active, deadline_s: float) -> None:
        outcome = Outcome(load=load, native_bytes=self._form.native_bytes(load.tokens))
        started_s = time.monotonic()
        try:
            with tracing.span(SPAN_TRANSFER, load.remote.traceparent) as span:
                try:
                    self._pull(load, active, outcome, deadline_s)
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
        outcome.total_s = time.monotonic() - started_s
        if outcome.end is not None:
            outcome.total_s = max(0.0, outcome.total_s - outcome.end.waited_s)
        self._renewals.drop(load.remote)
        with self._lock:
            self._active.pop(load.request_id, None)
        self._report(outcome)

    def _pull(self, load: Load, active: _Active, outcome: Outcome, deadline_s: float) -> None:
        frames, accept = self._ask(load, active, deadline_s)
        self._renewals.drop(load.remote)
        outcome.accept = accept
        received_before = frames.received_bytes
        receiver: Receiver | None = None
        try:
            check_form(accept.chunks, self._form, load.tokens)
            receiver = self._receiver(frames, accept, load.remote)
            outcome.transport = receiver.name
            self._receive(frames, load, accept, active, outcome, receiver)
            outcome.end = End.parse(self._message(frames, Kind.END))
            if load.remote.transfer:
                outcome.accept = replace(accept, model_s=outcome.end.model_s)
            frames.send(pack_header(Kind.DONE, 0))
            outcome.wire_bytes = frames.received_bytes - received_before
            self._finish(active, outcome)
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
        self._keep(load.remote, frames)

    def _ask(self, load: Load, active: _Active, deadline_s: float) -> tuple[FrameSocket, Accept]:
        """Ask for the KV and return the promise; a kept connection that turns out dead is replaced once."""
        remote = load.remote
        kept = self._take(remote)
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransferError(TransferReason.TIMEOUT, "waited too long for its turn")
            frames = kept or self._gate.connect(remote.host, remote.port, timeout_s=left_s)
            with self._lock:
                active.frames = frames
                cancelled = active.cancelled
            received_before = frames.received_bytes
            if cancelled:
                frames.interrupt()
            try:
                frames.set_budget(left_s)
                wish = self._wish(load, left_s).pack()
                frames.send(wish)
                frames.bind(wish[HEADER_BYTES:])
                return frames, Accept.parse(self._message(frames, Kind.ACCEPT))
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
            stages=self._stages,
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

    def _message(self, frames: FrameSocket, kind: Kind) -> bytes:
        """Receive a control message of one kind; a refusal in its place is raised."""
        header = frames.receive_header()
        if header.kind not in (kind, Kind.REFUSE):
            raise WireError(WireReason.MALFORMED, f"expected {kind.name}, got {header.kind.name}")
        body = frames.receive_body(header)
        if header.kind == Kind.REFUSE:
            raise Refuse.parse(body).error
        return body

    def _receive(
        self,
        frames: FrameSocket,
        load: Load,
        accept: Accept,
        active: _Active,
        outcome: Outcome,
        receiver: Receiver,
    ) -> None:
        """Receive all chunks, decoding each while the next ones arrive."""
        started_ns = time.time_ns()
        left = dict(enumerate(accept.chunks))
        while left:
            header = frames.receive_header()
            if header.kind == Kind.REFUSE:
                raise Refuse.parse(frames.receive_body(header)).error
            if header.kind != receiver.kind:
                raise WireError(
                    WireReason.MALFORMED,
                    f"expected {receiver.kind.name}, got {header.kind.name}",
                )
            index = header.index if load.remote.transfer else next(iter(left))
            if (chunk := left.pop(index, None)) is None:
                raise WireError(WireReason.MALFORMED, f"a chunk {index} that is not awaited")
            start_s = time.perf_counter()
            blob = receiver.receive(header, self._coder.max_bytes(chunk))
            outcome.wire_s += time.perf_counter() - start_s
            active.futures.append(self._coders.submit(self._decode, blob, chunk, load))
            if len(active.futures) >= BEHIND:
                outcome.decode_s += active.futures.pop(0).result()
        tracing.past_span(
            SPAN_WIRE,
            tracing.traceparent(),
            started_ns,
            time.time_ns(),
            {ATTR_PROFILE: accept.profile},
        )

    def _finish(self, active: _Active, outcome: Outcome) -> None:
        """Wait for the chunks that are still being decoded."""
        while active.futures:
            outcome.decode_s += active.futures.pop(0).result()
        now_ns = time.time_ns()
        tracing.past_span(
            SPAN_DECODE,
            tracing.traceparent(),
            now_ns - int(outcome.decode_s * 1e9),
            now_ns,
            {ATTR_NATIVE_BYTES: outcome.native_bytes},
        )

    def _decode(self, blob: bytearray, chunk: Chunk, load: Load) -> float:
        start_s = time.perf_counter()
        keys, values = self._coder.decode(blob, chunk)
        self._cache.write(chunk, load.block_ids, keys, values)
        return time.perf_counter() - start_s

    def _release(self, remote: Remote) -> None:
        with suppress(KVServeError):
            frames = self._take(remote) or self._gate.connect(
                remote.host, remote.port, timeout_s=self._config.stall_s
            )
            frames.set_budget(self._config.stall_s)
            message = Release(
                engine_id=remote.engine_id, request_id=remote.request_id, transfer=remote.transfer
            )
            frames.send(message.pack())
            self._keep(remote, frames)

    def _renew(self, remotes: Sequence[Remote]) -> None:
        """Tell a producer that its prefills are still wanted; if that fails, there is a next time."""
        first, limit_s = remotes[0], min(self._config.stall_s, self._config.lease_s)
        with suppress(KVServeError):
            frames = self._take(first) or self._gate.connect(
                first.host, first.port, timeout_s=limit_s
            )
            frames.set_budget(limit_s)
            names = tuple(remote.request_id for remote in remotes)
            for start in range(0, len(names), MAX_RENEWED):
                frames.send(Renew(names=names[start : start + MAX_RENEWED]).pack())
            self._keep(first, frames)

    def _take(self, remote: Remote) -> FrameSocket | None:
        """Return a kept connection to the producer."""
        with self._lock:
            for entry in reversed(self._idle):
                if entry[:2] == (remote.host, remote.port):
                    self._idle.remove(entry)
                    return entry[2]
        return None

    def _keep(self, remote: Remote, frames: FrameSocket) -> None:
        """Keep a connection for the next transfer."""
        with self._lock:
            self._idle.append((remote.host, remote.port, frames))
            dropped = self._idle.popleft()[2] if len(self._idle) > MAX_IDLE else None
        if dropped is not None:
            dropped.close()
