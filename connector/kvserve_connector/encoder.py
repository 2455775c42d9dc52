"""The chunks of one transfer on their way out of the cache: coded a few ahead of the wire, as a prefill makes them."""

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Final, NamedTuple, Protocol, TypeVar

from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import Chunk
from kvserve_connector.claims import Claim
from kvserve_connector.coding import ChunkCoder
from kvserve_strategies import Pipeline

T = TypeVar("T")

AHEAD: Final = 2
"""Chunks that may be coded before they are sent: enough to overlap, and it bounds memory."""


class Patience(Protocol):
    """Waits on behalf of a consumer, which is told that it has not been forgotten; raises when its time is over."""

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of a prefill; raise if it can't come about."""
        ...

    def result(self, future: Future[T]) -> T:
        """Wait for what is being coded, or has to wait its turn."""
        ...


class Coded(NamedTuple):
    """A chunk as it goes on the wire.

    Attributes:
        place: Where in the plan it is.
        blob: Its bytes.
        encode_s: Seconds that coding it took.
        pipeline: The strategy.
    """

    place: int
    blob: memoryview
    encode_s: float
    pipeline: Pipeline


_NOTHING: Final[Mapping[int, Coded]] = {}


class Encoder:
    """Codes the chunks of transfers; safe from any thread.

    Args:
        cache: The engine's KV cache.
        coder: What codes a chunk.
        threads: Threads that read the cache and encode.
    """

    def __init__(self, cache: EngineCache, coder: ChunkCoder, threads: Executor) -> None:
        self._cache = cache
        self._coder = coder
        self._threads = threads

    def encoded(
        self,
        claim: Claim,
        pipeline: Callable[[int], Pipeline],
        chunks: Sequence[Chunk],
        patience: Patience,
        ready: Mapping[int, Coded] = _NOTHING,
        done: Callable[[Coded], None] | None = None,
    ) -> Generator[Coded, None, None]:
        """Yield each chunk once, those that can be read first, else in order.

        When the generator is closed, nobody reads the prefill's blocks any more.

        Args:
            claim: The prefill.
            pipeline: Returns the strategy of a place in the plan; asked when its coding begins.
            chunks: The plan.
            patience: Waits for what can't be read or is not coded yet.
            ready: What was coded before, by its place in the plan; passed over where another strategy is to be used.
            done: Called with each chunk as soon as it is coded, by the thread that did it.

        Raises:
            TransferError: The prefill was aborted.
            WireError: It does not hold the blocks that it should.
        """
        waiting = set(range(len(chunks)))
        ahead: deque[tuple[int, Future[Coded | None]]] = deque()
        try:
            while waiting or ahead:
                while len(ahead) < AHEAD and (index := _next(claim, chunks, waiting)) is not None:
                    waiting.remove(index)
                    future = self._begin(claim, pipeline(index), index, chunks[index], ready, done)
                    ahead.append((index, future))
                if not ahead:
                    patience.wait(lambda: _next(claim, chunks, waiting) is not None)
                    continue
                index, future = ahead[0]
                coded = patience.result(future)
                ahead.popleft()
                if coded is None:
                    waiting.add(index)
                else:
                    yield coded
        finally:
            for _, future in ahead:
                if not future.cancel():
                    future.exception()

    def encode(self, claim: Claim, pipeline: Pipeline, place: int, chunk: Chunk) -> Coded | None:
        """Code one chunk, behind those that are waiting; None if it can't be read now."""
        return self._threads.submit(self._encode, claim, pipeline, place, chunk).result()

    def _begin(
        self,
        claim: Claim,
        pipeline: Pipeline,
        place: int,
        chunk: Chunk,
        ready: Mapping[int, Coded],
        done: Callable[[Coded], None] | None,
    ) -> Future[Coded | None]:
        coded = ready.get(place)
        if coded is None or coded.pipeline is not pipeline:
            return self._threads.submit(self._encode, claim, pipeline, place, chunk, done)
        if done is not None:
            done(coded)
        begun: Future[Coded | None] = Future()
        begun.set_result(coded)
        return begun

    def _encode(
        self,
        claim: Claim,
        pipeline: Pipeline,
        index: int,
        chunk: Chunk,
        done: Callable[[Coded], None] | None = None,
    ) -> Coded | None:
        """Code one chunk; None if the prefill was preempted meanwhile, and what was read may be another's."""
        seen = claim.computed
        if seen is None or not seen.holds(chunk):
            return None
        seen.written()
        start_s = time.perf_counter()
        keys, values = self._cache.read(chunk, seen.block_ids)
        if not claim.valid(seen):
            return None
        part = self._cache.form.parts[chunk.part]
        after = 0 if part.whole_blocks else claim.prefill.tokens - chunk.tokens.stop
        blob = self._coder.encode(pipeline, chunk, keys, values, tokens_after=after)
        coded = Coded(index, blob, time.perf_counter() - start_s, pipeline)
        if done is not None:
            done(coded)
        return coded


def _next(claim: Claim, chunks: Sequence[Chunk], waiting: Collection[int]) -> int | None:
    """Return the first of the waiting chunks that can be read now."""
    computed = claim.computed
    if computed is None:
        return None
    return min((index for index in waiting if computed.holds(chunks[index])), default=None)
