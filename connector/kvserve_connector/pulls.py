"""What a producer does for one PULL: finds the prefill, chooses a profile, codes and sends."""

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from kvserve_api.errors import (
    KVServeError,
    TransferError,
    TransferReason,
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
from kvserve_connector.choices import Asked, Choices
from kvserve_connector.chunks import Chunk
from kvserve_connector.claims import Claim
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.commands import Pull
from kvserve_connector.config import NIXL, TCP, ConnectorConfig
from kvserve_connector.course import Course, Rest
from kvserve_connector.cutting import Cutter
from kvserve_connector.encoder import Coded, Encoder
from kvserve_connector.frames import FrameSocket
from kvserve_connector.leases import SENT, LeaseBook
from kvserve_connector.links import LinkBook, LinkState
from kvserve_connector.metrics import Metrics
from kvserve_connector.patience import Patience
from kvserve_connector.probing import send_padding
from kvserve_connector.replies import Accept, End, Refuse
from kvserve_connector.selector import Choice, Selector
from kvserve_connector.staged import StagedSender
from kvserve_connector.staging import Staging
from kvserve_strategies import Pipeline

WAIT_S: Final = 1.0
"""So often at least a consumer that waits for a prefill is told that it has not been forgotten."""


class Pulls:
    """Answers what consumers ask for, each in the thread of its connection; coding is done in a shared pool.

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
        cutter = Cutter(cache.form, config.chunk_layers, step_tokens)
        self._choices = Choices(cache.form, selector, links, cutter)
        self._closed = False
        self._last: tuple[str, Pull] | None = None
        self._encoder = Encoder(cache, ChunkCoder(cache.form, bundles.find), coders)
        self._ahead: Ahead | None = None
        if config.encode_ahead_bytes and cache.form.opaque is None:
            self._ahead = Ahead(config.encode_ahead_bytes, leases, self._encoder, self._plan_ahead)
        # the cache itself is never registered: who has the agent's metadata reads all that is
        self.staging = Staging(config.staging_bytes) if config.transport == NIXL else None

    def start(self) -> None:
        """Begin to code ahead, if that is wanted."""
        if self._ahead is not None:
            self._ahead.start()

    def close(self) -> None:
        """Stop coding ahead, and let nobody wait any longer."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()

    def answer(self, frames: FrameSocket, peer: str, pull: Pull) -> None:
        """Send what one PULL asks for, or say why not.

        Args:
            frames: The connection.
            peer: The consumer's address.
            pull: What it asks for.

        Raises:
            KVServeError: It could not be sent whole; the consumer was told, if it could be.
        """
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
            claim.check(pull, self._form)
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

    def probe(self, frames: FrameSocket, peer: str) -> None:
        """Show how fast the link to a consumer is, which asks for it because that was wished for.

        Raises:
            KVServeError: The consumer is gone, or says something else.
        """
        self._metrics.probed(send_padding(frames, self._links.link(peer)))

    def _claim(self, pull: Pull, frames: FrameSocket) -> Claim:
        if pull.engine_id != self._engine_id:
            raise TransferError(
                TransferReason.EXPIRED, f"engine {pull.engine_id!r} is gone; another runs here"
            )
        return self._leases.claim(pull.request_id, frames.left_s)

    def _claim_transfer(self, pull: Pull, patience: Patience) -> Claim:
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

    def _patience(self, frames: FrameSocket) -> Patience:
        every_s = min(WAIT_S, self._config.stall_s / 3)
        return Patience(self._leases, frames, every_s, lambda: self._closed)

    def _send(
        self, frames: FrameSocket, peer: str, pull: Pull, claim: Claim, patience: Patience
    ) -> None:
        form = self._form
        asked = Asked(peer=peer, pull=pull, claim=claim)
        # chosen when the work begins: until then it is not in the way of others
        patience.wait(lambda: claim.computed is not None)
        self._last = (peer, pull)
        link = self._links.link(peer)
        coders = self._links.coders
        coders.follow(self._selector.table)
        choice = self._choices.choose(asked)
        for arrivals in (link.arrivals, coders.arrivals):
            arrivals.add(time.monotonic(), form.native_bytes(pull.tokens))
        chunks = self._choices.plan(asked, choice)
        ready: Mapping[int, Coded] = {}
        if self._ahead is not None:
            name = claim.prefill.request_id
            stock = self._ahead.take(name, choice.pipeline, pull.tokens)
            if stock is not None:
                chunks, ready = tuple(stock.chunks), stock.coded
        self._metrics.selected(choice.selection)
        course = Course(
            choice,
            chunks,
            [chunk.native_bytes(form.parts[chunk.part].layout) for chunk in chunks],
            link,
            coders,
            self._selector.prior_bytes_per_s,
            partial(self._choose_rest, asked, patience) if pull.takes_parts else None,
        )
        sender = self._sender(frames, pull, link)
        try:
            self._stream(frames, asked, choice, chunks, course, patience, ready, sender)
        finally:
            sender.close()
            course.end()

    def _sender(self, frames: FrameSocket, pull: Pull, link: LinkState) -> Sender:
        if self.staging is not None and pull.nixl:
            return StagedSender(frames, link, self.staging, self._config.stall_s)
        return TcpSender(frames, link)

    def _choose_rest(self, asked: Asked, patience: Patience, rest: Rest) -> Choice | None:
        # the deadline begins when the prefill has ended and is asked for
        spent_s = min(asked.claim.since_end_s, patience.spent_s)
        return self._choices.choose_rest(asked, spent_s, rest)

    def _plan_ahead(self, claim: Claim) -> tuple[Pipeline, tuple[Chunk, ...]] | None:
        """Plan for a prefill nobody has asked for as for a consumer like the last one; not before there was one."""
        if self._last is None:
            return None
        peer, last = self._last
        wish = replace(last, tokens=range(claim.prefill.tokens))
        asked = Asked(peer=peer, pull=wish, claim=claim)
        choice = self._choices.choose(asked, guess=True)
        if choice.selection.profile == NONE:
            # a copy is not worth its memory
            return None
        return choice.pipeline, self._choices.plan(asked, choice)

    def _stream(
        self,
        frames: FrameSocket,
        asked: Asked,
        choice: Choice,
        chunks: tuple[Chunk, ...],
        course: Course,
        patience: Patience,
        ready: Mapping[int, Coded],
        sender: Sender,
    ) -> None:
        pull, claim, selection = asked.pull, asked.claim, choice.selection
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
        started_ns = time.time_ns()
        encoded = self._encoder.encoded(
            claim, course.pipeline, chunks, patience, ready, course.coded
        )
        try:
            for coded in encoded:
                sender.send(coded.blob, coded.place)
                course.sent(coded)
            sender.finish()
        finally:
            # waits for chunks that are still being coded: after this nobody reads the lease's blocks
            encoded.close()
        parts = course.parts
        end = End(
            encode_s=sum(part.encode_s for part in parts.values()),
            goodput_bytes_per_s=course.link.snapshot(self._selector.prior_bytes_per_s).bytes_per_s,
            parts=parts if len(parts) > 1 else {},
            probe=sender.name == TCP and self._choices.wishes_probe(asked, choice),
        )
        if pull.transfer:
            end = replace(
                end,
                waited_s=patience.waited_s,
                model_s=claim.model_s,
                prefill_s=max(0.0, patience.spent_s - claim.since_end_s),
            )
        frames.send(end.pack())
        # what is still on its way may take all the time there is
        frames.set_budget(frames.left_s, patient=True)
        frames.receive_done()
        self._metrics.sent(parts, sender.name)
        tracing.past_span(
            SPAN_ENCODE,
            pull.traceparent,
            started_ns,
            started_ns + int(end.encode_s * 1e9),
            {
                ATTR_PROFILE: selection.profile,
                ATTR_BOUND: selection.bound.value,
                ATTR_NATIVE_BYTES: sum(part.native_bytes for part in parts.values()),
                ATTR_WIRE_BYTES: sum(part.wire_bytes for part in parts.values()),
            },
        )
