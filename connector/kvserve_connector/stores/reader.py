"""Reads prompt prefixes from a store into the engine's cache, in threads beside the engine's."""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

import numpy as np

from kvserve_api.errors import KVServeError, TransferError, TransferReason, UnavailableError
from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_api.telemetry import (
    ATTR_NATIVE_BYTES,
    ATTR_PROFILE,
    ATTR_REASON,
    ATTR_TOKENS,
    ATTR_WIRE_BYTES,
    ATTR_WORKLOAD,
    SPAN_STORE_LOAD,
    SPAN_STORE_LOOKUP,
)
from kvserve_connector import tracing
from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import Chunk
from kvserve_connector.recompute import LEAST_S, Verdict, Why, decide
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.keys import ChunkKey
from kvserve_connector.stores.link import StoreLink, fetch_s
from kvserve_connector.stores.messages import Lookup, StoreLoad
from kvserve_connector.stores.prefixes import Found, PrefixStore, Value
from kvserve_connector.stores.rates import Coding

logger = logging.getLogger(__name__)
T = TypeVar("T")
Arriving: TypeAlias = "Future[tuple[bytearray | None, float]]"
"""A value's blob, or that there is none, and how long it took in seconds."""

MAX_ASKS: Final = 4
"""Prompts that are looked for at once; more wait their turn."""
MAX_LOADS: Final = 4
"""Prefixes that are fetched at once; more wait their turn."""
MAX_GETS: Final = 8
"""Values that are fetched at once, over all loads."""
AHEAD: Final = range(2, 5)
"""Values of one load that are fetched at once, by what fits into a round trip; with `BEHIND` it bounds memory."""
BEHIND: Final = 2
"""Values of one load that may wait to be decoded before no more are asked for."""
MAX_PLANS: Final = 4096
EARLY: Final = 2
"""Values of a prefix that are asked for as soon as it is worth fetching, while the engine finds room for them."""

Codings = Callable[[str], tuple[Coding, ...]]
"""Returns what a workload class may be given, see `kvserve_connector.stores.rates.readable`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was found for a request, what it may take to fetch, and what of it is under way already."""

    found: Found
    codings: tuple[Coding, ...]
    verdict: Verdict
    workload: str
    traceparent: str | None
    early: dict[ChunkKey, Arriving] = field(default_factory=dict)


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


class PrefixReader:
    """Finds, decides, and fetches.

    When a load's end is reported, nothing of it will write into the cache any more.

    Args:
        config: Of the store.
        prefixes: What lies in the store.
        cache: The engine's KV cache.
        coders: Threads that decode and write the cache.
        codings: What a workload class may be given.
        link: What is known of the way to the store.
        answered: Takes for each request up to which token fetching is worth it, how many were found that are not here,
            and the verdict if there are any.
        loaded: Takes the end of each load.
        failed: Takes the reasons why lookups failed.
    """

    def __init__(
        self,
        config: StoreConfig,
        prefixes: PrefixStore,
        cache: EngineCache,
        coders: Executor,
        codings: Codings,
        link: StoreLink,
        *,
        answered: Callable[[str, int, int, Verdict | None], None],
        loaded: Callable[[Loaded], None],
        failed: Callable[[str], None],
    ) -> None:
        self._config = config
        self._prefixes = prefixes
        self._cache = cache
        self._coders = coders
        self._codings = codings
        self._link = link
        self._answered = answered
        self._loaded = loaded
        self._failed = failed
        self._asks = ThreadPoolExecutor(MAX_ASKS, thread_name_prefix="kvserve-ask")
        self._loads = ThreadPoolExecutor(MAX_LOADS, thread_name_prefix="kvserve-load")
        self._gets = ThreadPoolExecutor(MAX_GETS, thread_name_prefix="kvserve-get")
        self._lock = threading.Lock()
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._cancelled: set[str] = set()
        self._active: set[str] = set()
        self._asking: dict[str, float] = {}
        self._forgotten: set[str] = set()

    def ask(self, lookup: Lookup) -> None:
        """Begin to look for a prompt; the answer always comes, unless the store's client never returns."""
        now_s = time.monotonic()
        deadline_s = now_s + self._config.lookup_s
        with self._lock:
            hanging = sum(now_s > other_s for other_s in self._asking.values())
            self._asking[lookup.prompt.request_id] = deadline_s
        if hanging >= MAX_ASKS:
            # nobody is left who could ask, as with a network volume that is gone
            self._failed(UnavailableError.reason)
            self._answered(lookup.prompt.request_id, 0, 0, None)
            return
        self._asks.submit(self._look, lookup, deadline_s)

    def start(self, load: StoreLoad) -> None:
        """Begin to fetch what was found; the end always comes."""
        with self._lock:
            self._active.add(load.request_id)
        self._loads.submit(self._run, load)

    def forget(self, request_id: str) -> None:
        """Stop what is under way for a request soon; the end of a load is still reported."""
        with self._lock:
            _give_up(self._plans.pop(request_id, _NOTHING))
            if request_id in self._asking:
                self._forgotten.add(request_id)
            if request_id in self._active:
                self._cancelled.add(request_id)

    def close(self) -> None:
        """Stop everything."""
        with self._lock:
            self._cancelled |= self._active
        self._asks.shutdown(wait=False, cancel_futures=True)
        self._loads.shutdown(wait=False, cancel_futures=True)
        self._gets.shutdown(wait=False, cancel_futures=True)

    def _look(self, lookup: Lookup, deadline_s: float) -> None:
        prompt = lookup.prompt
        tokens, beyond, verdict = 0, 0, None
        try:
            with tracing.span(SPAN_STORE_LOOKUP, prompt.traceparent) as span:
                plan = self._find(lookup, deadline_s)
                if plan is not None:
                    verdict, beyond = plan.verdict, plan.found.stop - lookup.computed
                    span.set_attribute(ATTR_TOKENS, plan.found.stop)
                    span.set_attribute(ATTR_REASON, verdict.why.value)
                    if verdict.fetch:
                        tokens = plan.found.stop
                        self._keep(prompt.request_id, plan, lookup.computed)
        except KVServeError as error:
            self._failed(error.reason)
        except Exception:
            # whatever it was, the request must not wait for it
            logger.exception("looking for %s in the KV store failed", prompt.request_id)
            self._failed(KVServeError.reason)
        with self._lock:
            self._asking.pop(prompt.request_id, None)
            self._forgotten.discard(prompt.request_id)
        self._answered(prompt.request_id, tokens, beyond, verdict)

    def _find(self, lookup: Lookup, deadline_s: float) -> Plan | None:
        """Return what is there of a prompt beyond what is computed, and whether it is worth fetching."""
        prompt = lookup.prompt
        started_s = time.monotonic()
        if started_s >= deadline_s:
            raise TransferError(TransferReason.TIMEOUT, "waited too long for its turn")
        names = self._prefixes.names(
            np.frombuffer(prompt.tokens, dtype=np.int32).tolist(), prompt.extras
        )
        codings = self._codings(prompt.workload)
        found = self._prefixes.find(
            names,
            lookup.computed // self._config.chunk_tokens,
            [coding.pipeline for coding in codings],
            timeout_s=deadline_s - started_s,
        )
        now_s = time.monotonic()
        self._link.asked(now_s - started_s)
        if found.stop <= lookup.computed:
            return None
        _, measured = self._link.goodput(now_s)
        verdict = decide(
            fetch_s=self._fetch_s(found, codings, now_s),
            measured=measured,
            tokens=range(lookup.computed, found.stop),
            speed=lookup.speed,
            most_s=self._config.timeout_s,
            always=not self._config.recompute,
        )
        return Plan(
            found=found,
            codings=codings,
            verdict=verdict,
            workload=prompt.workload,
            traceparent=prompt.traceparent,
        )

    def _fetch_s(self, found: Found, codings: Sequence[Coding], now_s: float) -> float:
        by_rate = {coding.rate: coding for coding in codings}
        parts = []
        for value in found.values:
            rate, coding = value.key.rate, by_rate[value.key.rate]
            native_bytes = float(self._prefixes.native_bytes(value))
            ratio = self._link.ratio(rate, coding.ratio)
            parts.append((native_bytes, ratio, self._link.decode(now_s, rate, coding.decode)))
        return fetch_s(self._link.snapshot(now_s), parts)

    def _keep(self, request_id: str, plan: Plan, computed: int) -> None:
        """Keep what was found until the engine has room for it, and ask for its first values, if few others wait so."""
        deadline_s = time.monotonic() + plan.verdict.limit_s
        wanted = [v for v in plan.found.values if v.tokens.stop > computed]
        with self._lock:
            if request_id in self._forgotten:
                return
            _give_up(self._plans.pop(request_id, _NOTHING))
            if sum(bool(other.early) for other in self._plans.values()) < MAX_LOADS:
                for value in wanted[:EARLY]:
                    plan.early[value.key] = self._gets.submit(self._get, value, deadline_s)
            self._plans[request_id] = plan
            if len(self._plans) > MAX_PLANS:
                _give_up(self._plans.popitem(last=False)[1])

    def _run(self, load: StoreLoad) -> None:
        outcome = Loaded(load=load, stop=load.tokens.start)
        started_s = time.monotonic()
        with self._lock:
            plan = self._plans.pop(load.request_id, _NOTHING)
        try:
            with tracing.span(SPAN_STORE_LOAD, plan.traceparent) as span:
                try:
                    self._fetch(load, plan, outcome, started_s + plan.verdict.limit_s)
                finally:
                    span.set_attribute(ATTR_WORKLOAD, plan.workload)
                    span.set_attribute(ATTR_TOKENS, outcome.stop - load.tokens.start)
                    span.set_attribute(ATTR_PROFILE, ",".join(sorted(outcome.profiles)))
                    for position, attribute in enumerate((ATTR_NATIVE_BYTES, ATTR_WIRE_BYTES)):
                        total = sum(counts[position] for counts in outcome.profiles.values())
                        span.set_attribute(attribute, total)
        except KVServeError as error:
            outcome.failure, outcome.detail = error.reason, str(error)
        except MemoryError as error:
            outcome.failure, outcome.detail = TransferReason.OUT_OF_MEMORY, str(error)
        except Exception as error:
            logger.exception("fetching %s from the KV store failed", load.request_id)
            outcome.failure, outcome.detail = KVServeError.reason, str(error)
        outcome.total_s = time.monotonic() - started_s
        with self._lock:
            self._active.discard(load.request_id)
            if outcome.failure and load.request_id in self._cancelled:
                outcome.failure = TransferReason.CANCELLED
            self._cancelled.discard(load.request_id)
        self._loaded(outcome)

    def _fetch(self, load: StoreLoad, plan: Plan, outcome: Loaded, deadline_s: float) -> None:
        """Fetch values one after the other, decoding each while the next ones are on their way."""
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
                    arriving = plan.early.pop(value.key, None) or self._gets.submit(
                        self._get, value, deadline_s
                    )
                    getting.append((value, arriving))
                value, arriving = getting[0]
                blob, seconds = _result(arriving, deadline_s)
                getting.popleft()
                self._link.promise(-promised.popleft())
                if load.request_id in self._cancelled:
                    raise TransferError(TransferReason.CANCELLED, "the request has ended")
                if blob is None:
                    raise TransferError(
                        TransferReason.EXPIRED, "a value has gone since it was found"
                    )
                outcome.wire_s += seconds
                job = self._coders.submit(self._write, value, blob, load)
                decoding.append((value, len(blob), job))
                if len(decoding) >= BEHIND:
                    settle()
            while decoding:
                settle()
        finally:
            self._link.promise(-sum(promised))
            _give_up(plan)
            for _, arriving in getting:
                arriving.cancel()
            # before the end is known to anyone, every write into the cache has ended; what is whole is kept
            ended = load.request_id in self._cancelled
            while decoding:
                job = decoding[0][2]
                if (ended and job.cancel()) or job.exception() is not None:
                    decoding.popleft()
                else:
                    settle()
            outcome.stop = max(outcome.stop, min(whole_until(wanted, done), load.tokens.stop))

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


_NOTHING: Final = Plan(
    found=Found(),
    codings=(),
    verdict=Verdict(fetch=True, why=Why.UNMEASURED, fetch_s=0.0, recompute_s=None, limit_s=LEAST_S),
    workload=DEFAULT_CLASS,
    traceparent=None,
)
"""Stands for a plan that is forgotten, because very many others came after it: all must be computed."""


def _give_up(plan: Plan) -> None:
    """Leave what is under way for a plan that is of no use any more."""
    for arriving in plan.early.values():
        arriving.cancel()
    plan.early.clear()


def whole_until(wanted: Sequence[Value], done: Sequence[Value]) -> int:
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
