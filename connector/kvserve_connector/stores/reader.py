"""Reads prompt prefixes from a store into the engine's cache, in threads beside the engine's."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Final

import numpy as np

from kvserve_api.errors import KVServeError, TransferError, TransferReason, UnavailableError
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
from kvserve_connector.recompute import Verdict, decide
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.fetcher import Fetcher, Loaded
from kvserve_connector.stores.link import StoreLink, fetch_s
from kvserve_connector.stores.messages import Lookup, StoreLoad
from kvserve_connector.stores.plans import NOTHING, Plan
from kvserve_connector.stores.prefixes import Found, PrefixStore
from kvserve_connector.stores.rates import Coding

logger = logging.getLogger(__name__)

MAX_ASKS: Final = 4
"""Prompts that are looked for at once; more wait their turn."""
MAX_LOADS: Final = 4
"""Prefixes that are fetched at once; more wait their turn."""
MAX_PLANS: Final = 4096
EARLY: Final = 2
"""Values of a prefix that are asked for as soon as it is worth fetching, while the engine finds room for them."""
Codings = Callable[[str], tuple[Coding, ...]]
"""Returns what a workload class may be given, see `kvserve_connector.stores.rates.readable`."""


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
        threads: How many coders there are.
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
        threads: int = 1,
    ) -> None:
        self._config = config
        self._prefixes = prefixes
        self._codings = codings
        self._link = link
        self._answered = answered
        self._loaded = loaded
        self._failed = failed
        self._asks = ThreadPoolExecutor(MAX_ASKS, thread_name_prefix="kvserve-ask")
        self._loads = ThreadPoolExecutor(MAX_LOADS, thread_name_prefix="kvserve-load")
        self._fetcher = Fetcher(config, prefixes, cache, coders, link, threads)
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
            self._plans.pop(request_id, NOTHING).give_up()
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
        self._fetcher.close()

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
            self._plans.pop(request_id, NOTHING).give_up()
            if sum(bool(other.early) for other in self._plans.values()) < MAX_LOADS:
                for value in wanted[:EARLY]:
                    plan.early[value.key] = self._fetcher.begin(value, deadline_s)
            self._plans[request_id] = plan
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)[1].give_up()

    def _run(self, load: StoreLoad) -> None:
        outcome = Loaded(load=load, stop=load.tokens.start)
        started_s = time.monotonic()
        with self._lock:
            plan = self._plans.pop(load.request_id, NOTHING)
        try:
            with tracing.span(SPAN_STORE_LOAD, plan.traceparent) as span:
                try:
                    self._fetcher.fetch(
                        plan,
                        outcome,
                        started_s + plan.verdict.limit_s,
                        lambda: load.request_id in self._cancelled,
                    )
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
