"""The worker's side of a KV store: it owns the store's client and all threads that use it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Final

from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.coding import ChunkCoder, known_stages
from kvserve_connector.metrics import Metrics
from kvserve_connector.recompute import Verdict
from kvserve_connector.selector import Selector
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.fetcher import Loaded
from kvserve_connector.stores.link import StoreLink
from kvserve_connector.stores.messages import StoreNews, StoreStep
from kvserve_connector.stores.prefixes import PrefixStore
from kvserve_connector.stores.rates import Coding, readable
from kvserve_connector.stores.reader import PrefixReader
from kvserve_connector.stores.sealed import SealedStore, no_secrets
from kvserve_connector.stores.url import open_kv_store
from kvserve_connector.stores.writer import PrefixWriter, Saved
from kvserve_strategies import Pipeline, preset

logger = logging.getLogger(__name__)

IDLE_S: Final = 0.02
"""So long a step that computes nothing waits for news: vLLM would ask again every millisecond. A request that arrives
meanwhile waits for no longer."""
SHARED_IDLE_S: Final = 0.04
"""The same of an engine on CPUs: each time its three processes take four milliseconds from the core that decodes."""
SAVING_IDLE_S: Final = 0.008
"""The same where prompts are being saved only, which nobody waits for: a request that arrives must not wait long."""
UNHURRIED: Final = 1e-3
"""By how much encoding counts in the choice of how a prompt is stored: it is coded once, and nobody waits for it."""
LATE: Final = "Late"
"""Why a prompt is computed whose lookup did not end in time."""


class StoreWorker:
    """Does what the scheduler's side decided.

    Args:
        config: Of the store.
        weights: Name of the weights that are served.
        cache: The engine's KV cache, of plain keys and values.
        coder: Codes its chunks.
        coders: Threads that decode.
        selector: Holds the decision table in force.
        bundles: The calibration bundles of this pod.
        metrics: Where everything is counted.
        secrets: What values are sealed with, see `kvserve_connector.stores.sealed`.
        threads: How many coders there are.

    Raises:
        SpecError: The store's URL is none.
    """

    def __init__(
        self,
        config: StoreConfig,
        weights: str,
        cache: EngineCache,
        coder: ChunkCoder,
        coders: Executor,
        selector: Selector,
        bundles: BundleBook,
        metrics: Metrics,
        secrets: Callable[[], Sequence[bytes]] = no_secrets,
        threads: int = 1,
    ) -> None:
        self._config = config
        self._block_tokens = cache.form.parts[0].block_rows
        self._idle_s = SHARED_IDLE_S if cache.at_once else IDLE_S
        self._selector = selector
        self._bundles = bundles
        self._metrics = metrics
        self._link = StoreLink()
        self._store = open_kv_store(
            config.url,
            max_bytes=config.max_bytes,
            ttl_s=config.ttl_s,
            timeout_s=config.timeout_s,
        )
        prefixes = PrefixStore(
            SealedStore(self._store, secrets),
            cache.form,
            weights,
            coder,
            chunk_tokens=config.chunk_tokens,
        )
        self._lock = threading.Lock()
        self._news = StoreNews()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._ended: set[str] = set()
        self._kept: set[str] = set()
        self._sent: set[str] = set()
        self._pending: set[str] = set()
        self._idle = False
        self._changed = threading.Event()
        self._warm_up(coder, coders)
        self._reader = PrefixReader(
            config,
            prefixes,
            cache,
            coders,
            self._codings,
            self._link,
            answered=self._answer,
            loaded=self._end_load,
            failed=lambda reason: metrics.failed("lookup", reason),
            threads=threads,
        )
        self._writer = PrefixWriter(config, prefixes, cache, self._choose, self._end_save)

    def drop(self, step: StoreStep) -> None:
        """Stop reading blocks that this step will use otherwise."""
        for request_id in step.dropped:
            self._writer.drop(request_id)

    def take(self, step: StoreStep) -> None:
        """Start what a step brings; nothing here waits."""
        self._idle = step.idle
        with self._lock:
            self._pending.update(lookup.prompt.request_id for lookup in step.lookups)
            self._pending.update(load.request_id for load in step.loads)
        for lookup in step.lookups:
            self._metrics.store_tokens("asked", len(lookup.prompt.tokens) // 4 - lookup.computed)
            self._reader.ask(lookup)
        for load in step.loads:
            self._reader.start(load)
        for save in step.saves:
            self._writer.add(save)
        for _ in range(step.late):
            self._metrics.failed("lookup", LATE)
        for request_id in step.finished:
            self._reader.forget(request_id)
        with self._lock:
            if step.number is not None:
                self._news.steps.append(step.number)
            for request_id in step.kept:
                (self._sent if request_id in self._ended else self._kept).add(request_id)
            self._ended.difference_update(step.finished)

    def take_results(self) -> tuple[set[str], set[str], set[int]]:
        """Return since the last call: whose blocks were waited for and are read, what was received, and bad blocks.

        In a step that computes nothing it waits a moment for what is under way.
        """
        if self._idle and not self._news.found and not self._received:
            if self._pending:
                self._changed.wait(self._idle_s)
            elif self._kept and not self._sent:
                self._changed.wait(SAVING_IDLE_S)
        self._changed.clear()
        with self._lock:
            results = (self._sent, self._received, self._invalid)
            self._sent, self._received, self._invalid = set(), set(), set()
        self._metrics.store_operations(self._store.take_counts())
        return results

    def take_news(self) -> StoreNews | None:
        """Return the answers since the last call."""
        with self._lock:
            news, self._news = self._news, StoreNews()
        return news if news else None

    def close(self) -> None:
        """End everything."""
        self._reader.close()
        self._writer.close()

    def _answer(self, request_id: str, tokens: int, beyond: int, verdict: Verdict | None) -> None:
        if verdict is not None:
            self._metrics.store_decided(verdict.fetch, verdict.why.value)
            self._metrics.store_tokens("found", beyond)
        with self._lock:
            self._news.found[request_id] = tokens
            self._pending.discard(request_id)
        self._changed.set()

    def _end_load(self, outcome: Loaded) -> None:
        """Take note of a load that ended; in a thread of the reader's."""
        load = outcome.load
        self._metrics.store_tokens("loaded", outcome.stop - load.tokens.start)
        self._metrics.stored(
            "load",
            outcome.profiles,
            {"wire": outcome.wire_s, "decode": outcome.decode_s, "total": outcome.total_s},
            outcome.failure,
        )
        bad: tuple[int, ...] = ()
        if outcome.stop < load.tokens.stop:
            logger.warning(
                "tokens %d to %d of %s did not come from the KV store and are computed: %s",
                outcome.stop,
                load.tokens.stop,
                load.request_id,
                outcome.detail,
            )
            step = self._block_tokens
            bad = load.block_ids[outcome.stop // step : -(-load.tokens.stop // step)]
        with self._lock:
            self._received.add(load.request_id)
            self._invalid.update(bad)
            if bad:
                self._news.failed.add(load.request_id)
            self._pending.discard(load.request_id)
        self._changed.set()

    def _end_save(self, outcome: Saved) -> None:
        """Take note of a save that ended."""
        self._metrics.store_tokens("saved", outcome.tokens)
        self._metrics.stored(
            "save",
            {outcome.profile: (outcome.native_bytes, outcome.wire_bytes)} if outcome.values else {},
            {"encode": outcome.encode_s, "wire": outcome.put_s, "total": outcome.total_s},
            outcome.failure,
        )
        if outcome.failure:
            logger.info("%s is not saved: %s", outcome.request_id, outcome.detail)
        with self._lock:
            self._news.saved.add(outcome.request_id)
            if outcome.request_id in self._kept:
                self._kept.discard(outcome.request_id)
                self._sent.add(outcome.request_id)
            else:
                self._ended.add(outcome.request_id)
        self._changed.set()

    def _warm_up(self, coder: ChunkCoder, coders: Executor) -> None:
        """Decode once what may come without a table, where it will be: what has to be compiled takes seconds."""
        pipelines = [coding.pipeline for coding in self._codings(DEFAULT_CLASS)]
        for done in [coders.submit(coder.warm_up, pipeline) for pipeline in pipelines]:
            done.result()

    def _codings(self, workload: str) -> tuple[Coding, ...]:
        return readable(self._selector.ready, workload, self._config.profile)

    def _choose(self, workload: str, native_bytes: int, values: int) -> Coding:
        """Decide how a prompt is stored."""
        if self._config.profile is not None:
            name = self._config.profile
            return Coding(name=name, pipeline=Pipeline.of(preset(name)))
        choice = self._selector.choose(
            workload,
            native_bytes=native_bytes,
            link=replace(self._link.snapshot(time.monotonic()), encode_factor=UNHURRIED),
            chunks=values,
            stages=known_stages(),
            bundles=self._bundles.ready,
            peer="store",
        )
        return Coding(
            name=choice.selection.profile,
            pipeline=choice.pipeline,
            ratio=choice.ratio,
            decode=choice.decode,
        )


class ClosedStore:
    """A store that can't be used by this engine: nothing is found, nothing is saved."""

    def __init__(self) -> None:
        self._news = StoreNews()
        self._sent: set[str] = set()

    def drop(self, step: StoreStep) -> None:
        """Do nothing: nobody reads."""

    def take(self, step: StoreStep) -> None:
        """Answer at once."""
        self._news.found.update({lookup.prompt.request_id: 0 for lookup in step.lookups})
        self._news.saved.update(save.prompt.request_id for save in step.saves)
        self._sent.update(step.kept)
        if step.number is not None:
            self._news.steps.append(step.number)

    def take_results(self) -> tuple[set[str], set[str], set[int]]:
        """See `StoreWorker`."""
        sent, self._sent = self._sent, set()
        return sent, set(), set()

    def take_news(self) -> StoreNews | None:
        """See `StoreWorker`."""
        news, self._news = self._news, StoreNews()
        return news if news else None

    def close(self) -> None:
        """Do nothing."""
