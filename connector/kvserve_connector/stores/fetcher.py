"""Fetches the values of a prefix from a store, several at once, and decodes them into the engine's cache."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvserve_api.errors import TransferError, TransferReason
from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import Chunk
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.link import StoreLink
from kvserve_connector.stores.messages import StoreLoad
from kvserve_connector.stores.plans import Arriving, Plan
from kvserve_connector.stores.prefixes import PrefixStore, Value

T = TypeVar("T")
MAX_GETS: Final = 8
"""Values that are fetched at once, over all loads."""
AHEAD: Final = range(2, 5)
"""Values of one load that are fetched at once, by what fits into a round trip; with `BEHIND` it bounds memory."""
BEHIND: Final = 1
"""Values of one load that may wait while each thread decodes another; then no more are asked for."""


@dataclass(kw_only=True, slots=True)
class Loaded:
    """How a load ended.

    Attributes:
        load: What was wanted.
        stop: The prompt's tokens up to here are in the cache.
        profiles: For each profile native bytes, stored bytes and values.
        wire_s: Seconds of fetching, summed over values.
        decode_s: Seconds of decoding and writing into the cache.
        total_s: From the start to the last write.
        failure: Empty, or why the rest must be computed.
        detail: More about it, for people.
    """

    load: StoreLoad
    stop: int
    profiles: dict[str, tuple[int, int]] = field(default_factory=dict)
    wire_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    failure: str = ""
    detail: str = ""


class Fetcher:
    """Gets values out of a store, and has what a load wants of them written into the cache.

    Args:
        config: Of the store.
        prefixes: What lies in it.
        cache: The engine's KV cache.
        coders: Threads that decode and write the cache.
        link: What is known of the way to the store.
        threads: How many coders there are.
    """

    def __init__(
        self,
        config: StoreConfig,
        prefixes: PrefixStore,
        cache: EngineCache,
        coders: Executor,
        link: StoreLink,
        threads: int = 1,
    ) -> None:
        self._config = config
        self._prefixes = prefixes
        self._cache = cache
        self._coders = coders
        self._link = link
        self._decoding = threads + BEHIND
        self._gets = ThreadPoolExecutor(MAX_GETS, thread_name_prefix="kvserve-get")

    def begin(self, value: Value, deadline_s: float) -> Arriving:
        """Begin to get a value, as soon as a thread is free."""
        return self._gets.submit(self._get, value, deadline_s)

    def close(self) -> None:
        """Get nothing more."""
        self._gets.shutdown(wait=False, cancel_futures=True)

    def fetch(
        self, plan: Plan, outcome: Loaded, deadline_s: float, ended: Callable[[], bool]
    ) -> None:
        """Fetch values one after the other, decoding each while the next ones are on their way.

        Args:
            plan: What was found.
            outcome: Which load; takes how far it came, and what it took.
            deadline_s: When to give up.
            ended: Tells whether the request has ended.

        Raises:
            KVServeError: Not all of it could be had; what came before is in the cache.
        """
        load = outcome.load
        wanted = [v for v in plan.found.values if v.tokens.stop > load.tokens.start]
        if not wanted:
            raise TransferError(TransferReason.EXPIRED, "what was found is forgotten")
        profiles = {coding.rate: coding.name for coding in plan.codings}
        ratios = {
            coding.rate: self._link.ratio(coding.rate, coding.ratio) for coding in plan.codings
        }
        promised = deque(
            self._prefixes.native_bytes(value) / ratios[value.key.rate] for value in wanted
        )
        self._link.promise(sum(promised))
        ahead = self._ahead(sum(promised) / max(1, len(wanted)))
        waiting = deque(wanted)
        getting: deque[tuple[Value, Arriving]] = deque()
        decoding: deque[tuple[Value, int, Future[float]]] = deque()
        done: list[Value] = []

        def settle() -> None:
            value, nbytes, future = decoding[0]
            outcome.decode_s += (seconds := future.result())
            decoding.popleft()
            done.append(value)
            native_bytes = self._prefixes.native_bytes(value)
            self._link.decoded(time.monotonic(), value.key.rate, native_bytes, nbytes, seconds)
            name = profiles[value.key.rate]
            before = outcome.profiles.get(name, (0, 0))
            outcome.profiles[name] = (before[0] + native_bytes, before[1] + nbytes)

        try:
            while waiting or getting:
                while waiting and len(getting) < ahead:
                    value = waiting.popleft()
                    arriving = plan.early.pop(value.key, None) or self.begin(value, deadline_s)
                    getting.append((value, arriving))
                value, arriving = getting[0]
                blob, seconds = _result(arriving, deadline_s)
                getting.popleft()
                self._link.promise(-promised.popleft())
                if ended():
                    raise TransferError(TransferReason.CANCELLED, "the request has ended")
                if blob is None:
                    raise TransferError(
                        TransferReason.EXPIRED, "a value has gone since it was found"
                    )
                outcome.wire_s += seconds
                job = self._coders.submit(self._write, value, blob, load)
                decoding.append((value, len(blob), job))
                if len(decoding) >= self._decoding:
                    settle()
            while decoding:
                settle()
        finally:
            self._link.promise(-sum(promised))
            plan.give_up()
            for _, arriving in getting:
                arriving.cancel()
            # before the end is known to anyone, every write into the cache has ended; what is whole is kept
            over = ended()
            while decoding:
                job = decoding[0][2]
                if (over and job.cancel()) or job.exception() is not None:
                    decoding.popleft()
                else:
                    settle()
            outcome.stop = max(outcome.stop, min(_whole_until(wanted, done), load.tokens.stop))

    def _ahead(self, value_bytes: float) -> int:
        """Return how many values must be under way to keep the link busy."""
        link = self._link.snapshot(time.monotonic())
        in_flight = link.rtt_s * link.bytes_per_s / max(1.0, value_bytes)
        return max(AHEAD[0], min(AHEAD[-1], 1 + math.ceil(in_flight)))

    def _get(self, value: Value, deadline_s: float) -> tuple[bytearray | None, float]:
        started_s = time.monotonic()
        blob: bytearray | None = None
        self._link.begin(started_s)
        try:
            left_s = min(self._config.timeout_s, deadline_s - started_s)
            if left_s <= 0:
                raise TransferError(TransferReason.TIMEOUT, "the KV store took too long")
            blob = self._prefixes.get(value, timeout_s=left_s)
        finally:
            now_s = time.monotonic()
            self._link.end(now_s, 0 if blob is None else len(blob))
        return blob, now_s - started_s

    def _write(self, value: Value, blob: bytearray, load: StoreLoad) -> float:
        """Decode a value and write what is wanted of it into the cache; return how long it took."""
        started_s = time.monotonic()
        decoded = self._prefixes.decode(value, blob, timeout_s=self._config.timeout_s)
        start = max(value.tokens.start, load.tokens.start)
        stop = min(value.tokens.stop, load.tokens.stop)
        if start < stop:
            part = slice(start - value.chunk.tokens.start, stop - value.chunk.tokens.start)
            chunk = Chunk(layers=value.chunk.layers, tokens=range(start, stop))
            keys, values = (tensor[:, part] for tensor in decoded)
            self._cache.write(chunk, (load.block_ids,), keys, values)
        return time.monotonic() - started_s


def _whole_until(wanted: Sequence[Value], done: Sequence[Value]) -> int:
    """Return up to which token all layers of everything wanted are done; 0 if that is nothing."""
    stop, keys = 0, {value.key for value in done}
    for value in wanted:
        if value.key not in keys:
            return min(stop, value.tokens.start)
        stop = value.tokens.stop
    return stop


def _result(future: "Future[T]", deadline_s: float) -> T:
    """Wait for a result until a time.

    Raises:
        TransferError: It has passed.
    """
    try:
        return future.result(max(0.0, deadline_s - time.monotonic()))
    except FutureTimeoutError as error:
        if future.done():
            raise
        raise TransferError(TransferReason.TIMEOUT, "the KV store took too long") from error
