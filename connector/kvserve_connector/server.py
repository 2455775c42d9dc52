"""The producer's side of transfers: a small TCP server that sends what its leases hold."""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Final

from kvserve_api.errors import (
    KVServeError,
    TransferError,
    TransferReason,
    WireError,
    WireReason,
)
from kvserve_api.profile_set import NONE
from kvserve_api.telemetry import (
    ATTR_BOUND,
    ATTR_NATIVE_BYTES,
    ATTR_PROFILE,
    ATTR_WIRE_BYTES,
    SPAN_ENCODE,
)
from kvserve_connector import tracing
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import Chunk, plan_form
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.frames import FrameSocket
from kvserve_connector.handover import Lease
from kvserve_connector.leases import SENT, LeaseBook
from kvserve_connector.links import LinkBook, Promise
from kvserve_connector.metrics import Metrics
from kvserve_connector.protocol import Accept, End, Kind, Pull, Refuse, Release
from kvserve_connector.selector import Choice, Selector

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 128
IDLE_S: Final = 300.0
"""How long a connection may stay open between transfers."""
AHEAD: Final = 2
"""Chunks that may be coded before they are sent: enough to overlap, and it bounds memory."""


class TransferServer:
    """Serves transfers until it is closed; a thread for each connection, coding in a shared pool.

    Args:
        config: The connector's settings.
        engine_id: Identity of this run of the engine.
        cache: The engine's KV cache.
        leases: What may be sent.
        selector: What decides the profile.
        links: What is known of the consumers.
        coders: Threads that read the cache and encode.
        metrics: Where outcomes are counted.
        bundles: The calibration bundles of this pod.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        engine_id: str,
        cache: EngineCache,
        leases: LeaseBook,
        selector: Selector,
        links: LinkBook,
        coders: Executor,
        metrics: Metrics,
        bundles: BundleBook,
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._cache = cache
        self._form = cache.form
        self._leases = leases
        self._selector = selector
        self._links = links
        self._coders = coders
        self._metrics = metrics
        self._coder = ChunkCoder(cache.form, bundles.find)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: set[FrameSocket] = set()
        family = socket.AF_INET6 if ":" in config.listen_host else socket.AF_INET
        self._listener = socket.create_server(
            (config.listen_host, config.listen_port), family=family, backlog=MAX_CONNECTIONS
        )
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="kvserve-server", daemon=True)

    def start(self) -> None:
        """Begin to accept connections."""
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and end what is under way."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for frames in list(self._open):
            frames.interrupt()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=self._serve,
                args=(FrameSocket(connection, self._config.stall_s), str(address[0])),
                name="kvserve-send",
                daemon=True,
            ).start()

    def _serve(self, frames: FrameSocket, peer: str) -> None:
        """Answer one connection until it ends."""
        self._open.add(frames)
        try:
            while not self._closed and self._await_request(frames):
                frames.set_budget(self._config.stall_s)
                header = frames.receive_header()
                body = frames.receive_body(header)
                if header.kind == Kind.PULL:
                    self._answer(frames, peer, Pull.parse(body))
                elif header.kind == Kind.RELEASE:
                    release = Release.parse(body)
                    if release.engine_id == self._engine_id:
                        self._leases.release(release.request_id)
                else:
                    logger.info("connection from %s ended: %s comes first", peer, header.kind.name)
                    return
        except KVServeError as error:
            logger.info("connection from %s ended: %s", peer, error)
        except Exception:
            logger.exception("connection from %s failed", peer)
        finally:
            frames.close()
            self._open.discard(frames)
            self._room.release()

    def _await_request(self, frames: FrameSocket) -> bool:
        """Wait for the next request; False when the consumer is done with the connection."""
        frames.socket.settimeout(IDLE_S)
        try:
            return bool(frames.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _answer(self, frames: FrameSocket, peer: str, pull: Pull) -> None:
        """Send what one PULL asks for, or say why not."""
        frames.set_budget(min(pull.budget_s, self._config.timeout_s))
        try:
            lease = self._claim(pull, frames)
        except KVServeError as error:
            self._metrics.failed("send", error.reason)
            frames.send(Refuse(reason=error.reason, detail=str(error)).pack())
            return
        # a lease that was claimed ends here, however this goes: the consumer does not ask twice
        outcome: str = TransferReason.CANCELLED
        try:
            self._check(pull, lease)
            self._send(frames, peer, pull, lease)
            outcome = SENT
        except KVServeError as error:
            outcome = error.reason
            self._metrics.failed("send", error.reason)
            with suppress(KVServeError):
                frames.send(Refuse(reason=error.reason, detail=str(error)).pack())
            raise
        finally:
            self._leases.end(lease.request_id, outcome)

    def _claim(self, pull: Pull, frames: FrameSocket) -> Lease:
        if pull.engine_id != self._engine_id:
            raise TransferError(
                TransferReason.EXPIRED, f"engine {pull.engine_id!r} is gone; another runs here"
            )
        return self._leases.claim(pull.request_id, frames.left_s)

    def _check(self, pull: Pull, lease: Lease) -> None:
        """Refuse a consumer for which these bytes would mean something else."""
        if pull.fingerprint != self._form.fingerprint:
            raise WireError(WireReason.MODEL_MISMATCH, "the consumer serves another model")
        if pull.layout != self._form.layout:
            raise WireError(WireReason.LAYOUT_MISMATCH, f"here is {self._form.layout}")
        if pull.blocks != self._form.blocks:
            raise WireError(
                WireReason.LAYOUT_MISMATCH,
                "the consumer's blocks hold something else: another vLLM, attention backend or cache dtype",
            )
        if pull.tokens.stop != lease.tokens or pull.prompt_digest != lease.prompt_digest:
            raise WireError(WireReason.RANGE_MISMATCH, "the consumer's prompt is another one")

    def _send(self, frames: FrameSocket, peer: str, pull: Pull, lease: Lease) -> None:
        form = self._form
        native_bytes = form.native_bytes(pull.tokens)
        chunks = plan_form(form, pull.tokens, self._config.chunk_layers)
        link = self._links.link(peer)
        coders = self._links.coders
        coders.follow(self._selector.table)
        known = link.snapshot(self._selector.prior_bytes_per_s, coders)
        choice = self._selector.choose(
            lease.workload,
            native_bytes=native_bytes,
            link=known,
            chunks=len(chunks),
            stages=pull.stages,
            bundles=pull.bundles,
            peer=peer,
        )
        for arrivals in (link.arrivals, coders.arrivals):
            arrivals.add(time.monotonic(), native_bytes)
        if choice.pipeline.layer_step > 1:
            multiple = choice.pipeline.layer_step
            chunks = plan_form(
                form, pull.tokens, self._config.chunk_layers, layer_multiple=multiple
            )
        self._metrics.selected(choice.selection)
        promise = Promise(
            link=link,
            coders=coders,
            wire_bytes=native_bytes / choice.ratio,
            encode_s=choice.encode.seconds(native_bytes),
            decode_s=choice.decode.seconds(native_bytes),
        )
        promise.make()
        try:
            link.attach(frames.socket)
            self._stream(frames, pull, lease, choice, chunks, promise)
        finally:
            link.detach(frames.socket)
            promise.end()

    def _stream(
        self,
        frames: FrameSocket,
        pull: Pull,
        lease: Lease,
        choice: Choice,
        chunks: tuple[Chunk, ...],
        promise: Promise,
    ) -> None:
        selection = choice.selection
        link = promise.link
        frames.send(
            Accept(
                profile=selection.profile,
                wanted=selection.wanted,
                bound=selection.bound.value,
                predicted_s=selection.predicted_s,
                version=choice.version,
                pod=self._config.pod,
                model_s=lease.model_s,
                chunks=chunks,
            ).pack()
        )
        wire_bytes = 0
        encode_s = 0.0
        started_ns = time.time_ns()
        encoded = self._encoded(choice, lease, chunks)
        try:
            for blob, seconds in encoded:
                frames.send_chunk(blob)
                link.sample(frames.socket)
                promise.keep(1 / len(chunks))
                if selection.profile != NONE:
                    promise.coders.observe(seconds, promise.encode_s, 1 / len(chunks))
                wire_bytes += len(blob)
                encode_s += seconds
        finally:
            # waits for chunks that are still being coded: after this nobody reads the lease's blocks
            encoded.close()
        known = link.snapshot(self._selector.prior_bytes_per_s, promise.coders)
        frames.send(End(encode_s=encode_s, goodput_bytes_per_s=known.bytes_per_s).pack())
        # what is still on its way may take all the time there is
        frames.set_budget(frames.left_s, patient=True)
        done = frames.receive_header()
        if done.kind != Kind.DONE or done.length != 0:
            raise WireError(WireReason.MALFORMED, f"expected DONE, got {done.kind.name}")
        native_bytes = self._form.native_bytes(pull.tokens)
        self._metrics.sent(selection.profile, native_bytes, wire_bytes, encode_s)
        tracing.past_span(
            SPAN_ENCODE,
            pull.traceparent,
            started_ns,
            started_ns + int(encode_s * 1e9),
            {
                ATTR_PROFILE: selection.profile,
                ATTR_BOUND: selection.bound.value,
                ATTR_NATIVE_BYTES: native_bytes,
                ATTR_WIRE_BYTES: wire_bytes,
            },
        )

    def _encoded(
        self, choice: Choice, lease: Lease, chunks: tuple[Chunk, ...]
    ) -> Generator[tuple[memoryview, float], None, None]:
        """Yield each chunk's blob and the seconds it took, coding a few ahead of the wire."""
        waiting = iter(chunks)
        ahead: deque[Future[tuple[memoryview, float]]] = deque()
        try:
            while True:
                while len(ahead) < AHEAD and (chunk := next(waiting, None)) is not None:
                    ahead.append(self._coders.submit(self._encode, choice, lease, chunk))
                if not ahead:
                    return
                yield ahead[0].result()
                ahead.popleft()
        finally:
            for future in ahead:
                if not future.cancel():
                    future.exception()

    def _encode(self, choice: Choice, lease: Lease, chunk: Chunk) -> tuple[memoryview, float]:
        start_s = time.perf_counter()
        keys, values = self._cache.read(chunk, lease.block_ids)
        part = self._form.parts[chunk.part]
        after = 0 if part.whole_blocks else lease.tokens - chunk.tokens.stop
        blob = self._coder.encode(choice.pipeline, chunk, keys, values, tokens_after=after)
        return blob, time.perf_counter() - start_s
