"""The producer's side of transfers: a small TCP server that sends what its leases hold."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar

from kvserve_api.errors import (
    KVServeError,
    TransferError,
    TransferReason,
    UnauthenticatedError,
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
from kvserve_connector.ahead import Ahead
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.carriers import Sender, TcpSender
from kvserve_connector.chunks import Chunk, plan_ahead, plan_form
from kvserve_connector.claims import Claim
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.commands import Pull, Release, Renew
from kvserve_connector.config import NIXL, ConnectorConfig
from kvserve_connector.encoder import Coded, Encoder
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Door
from kvserve_connector.leases import SENT, LeaseBook
from kvserve_connector.links import LinkBook, LinkState, Promise
from kvserve_connector.metrics import Metrics
from kvserve_connector.protocol import Kind, pack_header
from kvserve_connector.replies import Accept, End, Refuse
from kvserve_connector.selector import Choice, Selector
from kvserve_connector.staged import StagedSender
from kvserve_connector.staging import Staging
from kvserve_strategies import Pipeline

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CONNECTIONS: Final = 512
IDLE_S: Final = 300.0
"""How long a connection may stay open between transfers."""
WAIT_S: Final = 1.0
"""So often at least a consumer that waits for a prefill is told that it has not been forgotten."""


class _Patience:
    """Waits for one prefill, and tells its consumer every now and then that it has not been forgotten.

    Args:
        leases: Where the prefill is.
        frames: The connection to the consumer.
        every_s: How often, in seconds.
        closed: Tells whether the producer ends.

    Attributes:
        waited_s: Seconds waited so far.
    """

    def __init__(
        self,
        leases: LeaseBook,
        frames: FrameSocket,
        every_s: float,
        closed: Callable[[], bool],
    ) -> None:
        self._leases = leases
        self._frames = frames
        self._every_s = every_s
        self._closed = closed
        self.waited_s = 0.0

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that changes as the prefill goes on."""
        start_s = time.monotonic()
        while not self._leases.wait(holds, self._every_s):
            self._tell()
        self.waited_s += time.monotonic() - start_s

    def result(self, future: Future[T]) -> T:
        """Wait for a chunk that is being coded, or behind those of other transfers."""
        while True:
            try:
                return future.result(self._every_s)
            except TimeoutError:
                if future.done():
                    raise
                self._tell()

    def _tell(self) -> None:
        if self._closed():
            raise TransferError(TransferReason.CANCELLED, "the producer ends")
        # fails when the consumer is gone, or its time is over
        self._frames.send(pack_header(Kind.WAIT, 0))


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
        step_tokens: Most tokens that the engine computes in one step.

    Attributes:
        port: Where it listens.
        staging: The memory that consumers read from by NIXL; None without it.
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
        step_tokens: int = 2048,
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._form = cache.form
        self._leases = leases
        self._selector = selector
        self._links = links
        self._metrics = metrics
        self._step_tokens = step_tokens
        self._last: tuple[str, Pull] | None = None
        self._encoder = Encoder(cache, ChunkCoder(cache.form, bundles.find), coders)
        self._ahead: Ahead | None = None
        if config.encode_ahead_bytes and cache.form.opaque is None:
            self._ahead = Ahead(config.encode_ahead_bytes, leases, self._encoder, self._plan_ahead)
        # the cache itself is never registered: who has the agent's metadata reads all that is
        self.staging = Staging(config.staging_bytes) if config.transport == NIXL else None
        self._door = Door(config)
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
        if self._ahead is not None:
            self._ahead.start()
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and end what is under way."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()
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
            frames = FrameSocket(connection, self._config.stall_s)
            self._door.knock(frames)
            threading.Thread(
                target=self._serve,
                args=(frames, str(address[0])),
                name="kvserve-send",
                daemon=True,
            ).start()

    def _serve(self, frames: FrameSocket, peer: str) -> None:
        """Answer one connection until it ends."""
        self._open.add(frames)
        try:
            self._door.admit(frames, self.port)
            while not self._closed and frames.wait(IDLE_S):
                frames.set_budget(self._config.stall_s)
                header = frames.receive_header()
                body = frames.receive_body(header)
                if header.kind == Kind.PULL:
                    frames.bind(body)
                    self._answer(frames, peer, Pull.parse(body))
                elif header.kind == Kind.RELEASE:
                    release = Release.parse(body)
                    if release.transfer or release.engine_id == self._engine_id:
                        self._leases.release(release.request_id, transfer=release.transfer)
                elif header.kind == Kind.RENEW:
                    self._leases.renew(Renew.parse(body).names)
                else:
                    self._door.expect_no(header.kind)
        except UnauthenticatedError as error:
            self._metrics.failed("send", error.reason)
            logger.warning("%s was turned away: %s", peer, error)
            self._door.turn_away(frames, error)
        except KVServeError as error:
            logger.info("connection from %s ended: %s", peer, error)
        except Exception:
            logger.exception("connection from %s failed", peer)
        finally:
            frames.close()
            self._door.leave(frames)
            self._open.discard(frames)
            self._room.release()

    def _answer(self, frames: FrameSocket, peer: str, pull: Pull) -> None:
        """Send what one PULL asks for, or say why not."""
        most_s = self._config.timeout_s
        if pull.transfer:
            most_s += self._config.prefill_timeout_s
        frames.set_budget(min(pull.budget_s, most_s))
        # one for both: a prefill that has not come yet is waited for no less than one that goes on
        patience = self._patience(frames)
        try:
            claim = (
                self._claim_transfer(pull, patience) if pull.transfer else self._claim(pull, frames)
            )
        except KVServeError as error:
            self._metrics.failed("send", error.reason)
            frames.send(Refuse(reason=error.reason, detail=str(error)).pack())
            return
        # a lease that was claimed ends here, however this goes: the consumer does not ask twice
        outcome: str = TransferReason.CANCELLED
        try:
            self._check(pull, claim)
            self._send(frames, peer, pull, claim, patience)
            outcome = SENT
        except KVServeError as error:
            outcome = error.reason
            self._metrics.failed("send", error.reason)
            with suppress(KVServeError):
                frames.send(Refuse(reason=error.reason, detail=str(error)).pack())
            raise
        finally:
            self._leases.end(claim.prefill.request_id, outcome)

    def _claim(self, pull: Pull, frames: FrameSocket) -> Claim:
        if pull.engine_id != self._engine_id:
            raise TransferError(
                TransferReason.EXPIRED, f"engine {pull.engine_id!r} is gone; another runs here"
            )
        return self._leases.claim(pull.request_id, frames.left_s)

    def _claim_transfer(self, pull: Pull, patience: _Patience) -> Claim:
        """Wait for a prefill of which the consumer may have heard first."""
        # which run of the engine was meant does not matter: no other request has the transfer's name
        found: list[Claim] = []
        deadline_s = time.monotonic() + self._config.lease_s

        def arrived() -> bool:
            if (claim := self._leases.claim_transfer(pull.request_id)) is not None:
                found.append(claim)
            elif time.monotonic() > deadline_s:
                raise TransferError(
                    TransferReason.EXPIRED,
                    f"no prefill came for transfer {pull.request_id!r} in {self._config.lease_s:g} s",
                )
            return claim is not None

        patience.wait(arrived)
        return found[0]

    def _patience(self, frames: FrameSocket) -> _Patience:
        every_s = min(WAIT_S, self._config.stall_s / 3)
        return _Patience(self._leases, frames, every_s, lambda: self._closed)

    def _check(self, pull: Pull, claim: Claim) -> None:
        """Refuse a consumer for which these bytes would mean something else."""
        if pull.fingerprint != self._form.fingerprint:
            raise WireError(WireReason.MODEL_MISMATCH, "the consumer serves another model")
        if pull.layout != self._form.layout:
            raise WireError(WireReason.LAYOUT_MISMATCH, f"here is {self._form.layout}")
        if (pull.rank, pull.ranks) != (self._form.rank, self._form.ranks):
            raise WireError(
                WireReason.LAYOUT_MISMATCH,
                f"the consumer is worker {pull.rank} of {pull.ranks}, this is {self._form.rank} of"
                f" {self._form.ranks}: give both tensor_parallel_size {self._form.ranks}",
            )
        if pull.blocks != self._form.blocks:
            raise WireError(
                WireReason.LAYOUT_MISMATCH,
                "the consumer's blocks hold something else: another vLLM, attention backend or cache dtype",
            )
        prefill = claim.prefill
        if (pull.tokens.stop, pull.prompt_digest) != (prefill.tokens, prefill.prompt_digest):
            raise WireError(WireReason.RANGE_MISMATCH, "the consumer's prompt is another one")

    def _send(
        self, frames: FrameSocket, peer: str, pull: Pull, claim: Claim, patience: _Patience
    ) -> None:
        form = self._form
        native_bytes = form.native_bytes(pull.tokens)
        # chosen when the work begins: until then it is not in the way of others
        patience.wait(lambda: claim.computed is not None)
        chunks = self._plan(pull, claim, 1)
        self._last = (peer, pull)
        link = self._links.link(peer)
        coders = self._links.coders
        coders.follow(self._selector.table)
        choice = self._choose(peer, pull, claim, len(chunks))
        for arrivals in (link.arrivals, coders.arrivals):
            arrivals.add(time.monotonic(), native_bytes)
        if choice.pipeline.layer_step > 1:
            multiple = choice.pipeline.layer_step
            chunks = self._plan(pull, claim, multiple)
        ready: Mapping[int, Coded] = {}
        if self._ahead is not None:
            name = claim.prefill.request_id
            stock = self._ahead.take(name, choice.pipeline, pull.tokens)
            if stock is not None:
                chunks, ready = tuple(stock.chunks), stock.coded
        self._metrics.selected(choice.selection)
        promise = Promise(
            link=link,
            coders=coders,
            wire_bytes=native_bytes / choice.ratio,
            encode_s=choice.encode.seconds(native_bytes),
            decode_s=choice.decode.seconds(native_bytes),
        )
        promise.make()
        sender = self._sender(frames, pull, link)
        try:
            self._stream(frames, pull, claim, choice, chunks, promise, patience, ready, sender)
        finally:
            sender.close()
            promise.end()

    def _sender(self, frames: FrameSocket, pull: Pull, link: LinkState) -> Sender:
        if self.staging is not None and pull.nixl:
            return StagedSender(frames, link, self.staging, self._config.stall_s)
        return TcpSender(frames, link)

    def _plan(self, pull: Pull, claim: Claim, layer_multiple: int) -> tuple[Chunk, ...]:
        layers = self._config.chunk_layers
        if claim.kept or self._form.opaque is not None:
            return plan_form(self._form, pull.tokens, layers, layer_multiple=layer_multiple)
        return plan_ahead(
            self._form,
            pull.tokens,
            layers,
            layer_multiple=layer_multiple,
            step_tokens=self._step_tokens,
        )

    def _choose(
        self, peer: str, pull: Pull, claim: Claim, chunks: int, *, guess: bool = False
    ) -> Choice:
        known = self._links.link(peer).snapshot(
            self._selector.prior_bytes_per_s, self._links.coders, pull.decode_delays
        )
        return self._selector.choose(
            claim.prefill.workload,
            native_bytes=self._form.native_bytes(pull.tokens),
            link=known,
            chunks=chunks,
            stages=pull.stages,
            bundles=pull.bundles,
            peer=peer,
            guess=guess,
        )

    def _plan_ahead(self, claim: Claim) -> tuple[Pipeline, tuple[Chunk, ...]] | None:
        """Plan for a prefill nobody has asked for as for a consumer like the last one; not before there was one."""
        if self._last is None:
            return None
        peer, last = self._last
        wish = replace(last, tokens=range(claim.prefill.tokens))
        choice = self._choose(peer, wish, claim, len(self._plan(wish, claim, 1)), guess=True)
        if choice.selection.profile == NONE:
            # a copy is not worth its memory
            return None
        return choice.pipeline, self._plan(wish, claim, choice.pipeline.layer_step)

    def _stream(
        self,
        frames: FrameSocket,
        pull: Pull,
        claim: Claim,
        choice: Choice,
        chunks: tuple[Chunk, ...],
        promise: Promise,
        patience: _Patience,
        ready: Mapping[int, Coded],
        sender: Sender,
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
                model_s=claim.model_s,
                chunks=chunks,
                nixl=sender.offer,
            ).pack()
        )
        wire_bytes = 0
        encode_s = 0.0
        started_ns = time.time_ns()
        encoded = self._encoder.encoded(claim, choice.pipeline, chunks, patience, ready)
        try:
            for index, blob, seconds in encoded:
                sender.send(blob, index)
                promise.keep(1 / len(chunks))
                if selection.profile != NONE:
                    promise.coders.observe(seconds, promise.encode_s, 1 / len(chunks))
                wire_bytes += len(blob)
                encode_s += seconds
            sender.finish()
        finally:
            # waits for chunks that are still being coded: after this nobody reads the lease's blocks
            encoded.close()
        known = link.snapshot(self._selector.prior_bytes_per_s, promise.coders)
        end = End(encode_s=encode_s, goodput_bytes_per_s=known.bytes_per_s)
        if pull.transfer:
            end = replace(end, waited_s=patience.waited_s, model_s=claim.model_s)
        frames.send(end.pack())
        # what is still on its way may take all the time there is
        frames.set_budget(frames.left_s, patient=True)
        done = frames.receive_header()
        if done.kind != Kind.DONE or done.length != 0:
            raise WireError(WireReason.MALFORMED, f"expected DONE, got {done.kind.name}")
        native_bytes = self._form.native_bytes(pull.tokens)
        self._metrics.sent(selection.profile, native_bytes, wire_bytes, encode_s, sender.name)
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
