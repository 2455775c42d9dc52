"""Chunks of a transfer on their way into the engine's cache."""

import time
from concurrent.futures import Executor, Future
from typing import Final

from kvserve_api.errors import WireError, WireReason
from kvserve_api.telemetry import ATTR_NATIVE_BYTES, ATTR_PROFILE, SPAN_DECODE, SPAN_WIRE
from kvserve_connector import tracing
from kvserve_connector.cache import EngineCache
from kvserve_connector.carriers import Receiver
from kvserve_connector.chunks import Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.frames import FrameSocket
from kvserve_connector.handover import Load
from kvserve_connector.outcome import Outcome
from kvserve_connector.protocol import Kind
from kvserve_connector.replies import Accept, Refuse

BEHIND: Final = 2
"""Chunks that may wait to be decoded: then no more are received, and TCP holds the producer back."""


class Intake:
    """Takes the chunks of transfers in: receives them, decodes them, and writes them into the engine's cache.

    Args:
        coder: Decodes them.
        cache: The engine's KV cache.
        coders: Threads that decode and write the cache.
    """

    def __init__(self, coder: ChunkCoder, cache: EngineCache, coders: Executor) -> None:
        self._coder = coder
        self._cache = cache
        self._coders = coders

    def receive(
        self,
        frames: FrameSocket,
        accept: Accept,
        receiver: Receiver,
        outcome: Outcome,
        decoding: list[Future[float]],
    ) -> None:
        """Receive all chunks, decoding each while the next ones arrive.

        Args:
            frames: The connection.
            accept: What was promised.
            receiver: What takes a chunk's bytes.
            outcome: Of which load; takes the seconds of receiving and decoding.
            decoding: Takes what may write into the cache still; the caller waits for it, whatever happens.

        Raises:
            KVServeError: The transfer has failed.
        """
        load, started_ns = outcome.load, time.time_ns()
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
            decoding.append(self._coders.submit(self._decode, blob, chunk, load))
            if len(decoding) >= BEHIND:
                outcome.decode_s += decoding.pop(0).result()
        tracing.past_span(
            SPAN_WIRE,
            tracing.traceparent(),
            started_ns,
            time.time_ns(),
            {ATTR_PROFILE: accept.profile},
        )

    def finish(self, outcome: Outcome, decoding: list[Future[float]]) -> None:
        """Wait for the chunks that are still being decoded."""
        while decoding:
            outcome.decode_s += decoding.pop(0).result()
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


def receive_message(frames: FrameSocket, kind: Kind) -> bytes:
    """Receive the body of a control message of one kind.

    Raises:
        KVServeError: Something else comes; a refusal says what it means.
    """
    header = frames.receive_header()
    if header.kind not in (kind, Kind.REFUSE):
        raise WireError(WireReason.MALFORMED, f"expected {kind.name}, got {header.kind.name}")
    body = frames.receive_body(header)
    if header.kind == Kind.REFUSE:
        raise Refuse.parse(body).error
    return body
