"""The half of the connector that lives with the KV cache: it owns the transfers, and the channel to the controller."""

import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvserve_api.credentials import Credentials
from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.table import Role
from kvserve_connector.bundles import BundleBook, open_artifacts
from kvserve_connector.cache import EngineCache, open_cache
from kvserve_connector.client import TransferClient
from kvserve_connector.coding import ChunkCoder, known_stages
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.control import ControlClient
from kvserve_connector.control_messages import Identity
from kvserve_connector.engine import Engine
from kvserve_connector.form import Form
from kvserve_connector.handover import Progress
from kvserve_connector.leases import LeaseBook
from kvserve_connector.links import LinkBook
from kvserve_connector.loads import delays
from kvserve_connector.metadata import ServerAddress, StepMetadata
from kvserve_connector.metrics import Data, Metrics
from kvserve_connector.outcome import Outcome
from kvserve_connector.processors import processors
from kvserve_connector.pulls import Pulls
from kvserve_connector.ready import ReadyTable
from kvserve_connector.remote import Remote
from kvserve_connector.selector import Selector
from kvserve_connector.server import TransferServer
from kvserve_connector.stores.messages import StoreNews
from kvserve_connector.stores.sealed import no_secrets
from kvserve_connector.stores.worker import ClosedStore, StoreWorker
from kvserve_connector.threads import name_thread
from kvserve_connector.versions import installed
from kvserve_connector.warmup import WarmUp
from kvserve_strategies import Pipeline

logger = logging.getLogger(__name__)

SWITCH_S: Final = 0.0005
"""How long a thread may keep the interpreter from others that wait for it; Python's default is ten times that.

The coding threads drop the interpreter lock for each piece of work and need it back after. Beside an engine's busy main
thread on one core, the default made coding seven times slower than alone, this makes it three times (two is the fair
share of the core).
"""

IDLE_S: Final = 0.008
"""So long a step that computes nothing waits for a transfer to end; a request that arrives meanwhile waits no longer.

vLLM would begin the next such step after a millisecond, and its main thread looks for it all the time: it takes the
core and the interpreter lock of the threads that transfer.
"""

CODER: Final = "kvserve-code"
"""Name of the threads that encode and decode."""


class WorkerHalf:
    """Does what the scheduler half decided, in threads beside the engine's.

    Args:
        config: The connector's settings.
        engine: The engine's facts.
        is_producer: This engine prefills for others.
        is_consumer: This engine fetches the KV of others.
        rank: Which of the engine's tensor-parallel workers this is.
        weights: Name of the weights that are served, for the KV store.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        engine: Engine,
        *,
        is_producer: bool,
        is_consumer: bool,
        rank: int = 0,
        weights: str = "",
    ) -> None:
        self._config = config
        self._rank = rank
        self._engine = engine
        self._processors = math.inf
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._idle = False
        self._ended = threading.Event()
        self._leases = LeaseBook(config.lease_s, ended=self._ended.set)
        self._selector = Selector()
        self._links = LinkBook(config.codec_threads, config.probe_share)
        self._metrics = Metrics(self._selector)
        self._bundles = BundleBook(open_artifacts(config), engine.fingerprint, engine.layout)
        self._control = ControlClient(
            config,
            Identity(
                role=Role.PREFILL if is_producer else Role.DECODE,
                fingerprint=engine.fingerprint,
                version=installed("kvserve") or "",
            ),
            self._selector,
            self._metrics.reports_dropped,
            self._bundles,
            self._make_ready,
            self._carries,
            self._metrics.control_failed,
        )
        self._coders = ThreadPoolExecutor(
            config.codec_threads,
            thread_name_prefix=CODER,
            initializer=name_thread,
            initargs=(CODER,),
        )
        self._form: Form | None = None
        self._warm_up: WarmUp | None = None
        self._server: TransferServer | None = None
        self._client: TransferClient | None = None
        self._lock = threading.Lock()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._cache: EngineCache | None = None
        self._layers: dict[str, int] = {}
        self._progress: list[Progress] = []
        self._written_layers = 0
        self._weights = weights
        self._store: StoreWorker | ClosedStore = ClosedStore()
        self._invalid: set[int] = set()
        self._holders: Counter[str] = Counter()

    def open(
        self, kv_caches: Mapping[str, torch.Tensor], attention_layers: Mapping[str, Any]
    ) -> None:
        """Take over the engine's cache and begin to serve; a cache that can't be carried is served by recomputing.

        Raises:
            SpecError: The transfer server's address is taken or not ours.
        """
        try:
            cache = open_cache(self._engine, kv_caches, attention_layers, self._rank)
        except UnsupportedError as error:
            self._metrics.opened(UnsupportedError.reason)
            logger.warning("KV is not transferred, every request computes its own: %s", error)
        else:
            self._serve(cache)
        self._control.start()

    def _serve(self, cache: EngineCache) -> None:
        self._cache = cache
        self._form = cache.form
        if cache.at_once:
            # an engine on a GPU does not compute on processors that coding could take from it
            self._processors = processors()
        if cache.at_once and cache.form.opaque is None and not self._engine.splits_steps:
            names = cache.form.parts[0].group.layer_names
            self._layers = {name: index for index, name in enumerate(names)}
        coder = ChunkCoder(cache.form, self._bundles.find)
        self._warm_up = warm_up = WarmUp(coder, cache, self._config.chunk_layers)
        if cache.form.opaque is not None:
            self._metrics.opened(cache.form.opaque)
            logger.info(
                "KV is carried as whole blocks, raw or lossless, never by a lossy profile: %s",
                cache.form.opaque,
            )
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        # in the threads that will code: torch sets itself up anew in each
        warm_up.rehearse(self._coders, self._config.codec_threads, self._engine)
        if self._is_producer:
            pulls = Pulls(
                self._config,
                self._engine.engine_id,
                cache,
                self._leases,
                self._selector,
                self._links,
                self._coders,
                self._metrics,
                self._bundles,
                self._engine.step_tokens,
            )
            try:
                self._server = TransferServer(
                    self._config, self._engine.engine_id, self._leases, self._metrics, pulls
                )
            except OSError as error:
                where = f"{self._config.listen_host}:{self._config.listen_port}"
                raise SpecError(
                    f"{PATH}.listen_port", f"can't listen on {where}: {error}; 0 takes a free one"
                ) from error
            self._server.start()
            logger.info("KV transfers are served on port %d", self._server.port)
        if self._is_consumer:
            self._client = TransferClient(
                self._config,
                cache,
                known_stages(),
                self._bundles,
                self._coders,
                self._done,
            )
        if self._config.store is not None and cache.form.opaque is None:
            self._store = StoreWorker(
                self._config.store,
                self._weights,
                cache,
                coder,
                self._coders,
                self._selector,
                self._bundles,
                self._metrics,
                _secrets(self._config),
                self._config.codec_threads,
            )

    @property
    def address(self) -> ServerAddress | None:
        """Where consumers reach this producer."""
        if self._server is None:
            return None
        return ServerAddress(host=self._config.advertise_host, port=self._server.port)

    def let_go(self, step: StepMetadata) -> None:
        """Take note of prefills that came, and let go of blocks that were lost; before the step writes anything."""
        if step.store is not None:
            self._store.drop(step.store)
        for prefill in step.prefills:
            self._leases.begin(prefill)
        for request_id in step.preempted:
            self._leases.preempt(request_id)
        for request_id in step.stopped:
            self._leases.stop(request_id)

    def layer_written(self, layer_name: str) -> None:
        """Take note that the step has written a layer."""
        # layers that come in another order count when the step has ended
        if self._progress and self._layers.get(layer_name) == self._written_layers:
            self._written_layers += 1
            for progress in self._progress:
                self._leases.advance(progress, layers=self._written_layers)

    def step_written(self) -> None:
        """Take note that the step has written all layers, or on a GPU will have."""
        if self._progress and self._cache is not None:
            written = self._cache.fence()
            for progress in self._progress:
                self._leases.advance(progress, written=written)
        self._progress = []

    def take(self, step: StepMetadata) -> None:
        """Start what a step brings; nothing here waits."""
        self._idle = step.idle
        delayed = delays(step.requests, self._processors)
        self._links.coders.delays = delayed
        if self._client is not None:
            self._client.decode_delays = delayed
        # whole blocks hold more than their first tokens: they are read when the prefill has ended
        if self._form is not None and self._form.opaque is None:
            self._progress = step.progress
        self._written_layers = 0
        if step.store is not None:
            self._holders.update(step.store.kept)
            self._store.take(step.store)
        for lease in step.leases:
            self._holders[lease.request_id] += 1
            self._leases.add(lease)
        for _ in range(step.unserved):
            self._metrics.failed("send", UnsupportedError.reason)
        if self._client is None:
            # of a cache that can't be carried: computed here
            for load in step.loads:
                self._done(
                    Outcome(
                        load=load, failure=UnsupportedError.reason, detail="see the log's start"
                    )
                )
        else:
            for remote in step.wanted:
                for mine in self._mine(remote):
                    self._client.expect(mine)
            for load in step.loads:
                self._client.start(replace(load, remote=load.remote.of_rank(self._rank)))
            for remote in step.releases:
                for mine in self._mine(remote):
                    self._client.release(mine)
            for request_id in step.cancelled:
                self._client.cancel(request_id)

    def results(self) -> KVConnectorTransferResults:
        """Return what ended since the last call; in a step that computes nothing, wait a moment for it."""
        if self._idle and self._transfers:
            self._ended.wait(IDLE_S)
        self._ended.clear()
        ended, counts = self._leases.take_ended()
        self._metrics.leases_ended(counts)
        saved, loaded, self._invalid = self._store.take_results()
        # a lease and a save may hold the same blocks
        self._holders.subtract([*ended, *saved])
        sent = {each for each in ended | saved if self._holders[each] <= 0}
        for request_id in sent:
            del self._holders[request_id]
        with self._lock:
            received, self._received = self._received | loaded, set()
            failed, self._failed = self._failed, set()
        return KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed
        )

    def take_invalid(self) -> set[int]:
        """Return the blocks of requests in the last results that must be computed."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_news(self) -> StoreNews | None:
        """Return what the KV store answered since the last call."""
        return self._store.take_news()

    def take_totals(self) -> Data:
        """Return what was counted since the last call."""
        return self._metrics.take_totals()

    def close(self) -> None:
        """End all transfers and the channel to the controller."""
        self._control.close()
        if self._server is not None:
            self._server.close()
        if self._client is not None:
            self._client.close()
        self._store.close()
        self._coders.shutdown(wait=False, cancel_futures=True)

    @property
    def _transfers(self) -> bool:
        """Whether something is being sent or fetched."""
        return self._leases.claimed or (self._client is not None and self._client.busy)

    def _mine(self, remote: Remote) -> list[Remote]:
        """Return the workers elsewhere that this one speaks to: its like, or all if there are not as many."""
        if remote.ranks == self._engine.ranks:
            return [remote.of_rank(self._rank)]
        return [remote.of_rank(rank) for rank in range(remote.ranks)] if self._rank == 0 else []

    def _done(self, outcome: Outcome) -> None:
        """Take note of a transfer that ended; in a thread of the client's."""
        self._metrics.received(outcome)
        self._control.report(outcome)
        request_id = outcome.load.request_id
        if outcome.failure:
            logger.warning(
                "KV of %s did not arrive and is computed here: %s", request_id, outcome.detail
            )
        with self._lock:
            self._received.add(request_id)
            if outcome.failure:
                self._failed.add(request_id)
        self._ended.set()

    def _carries(self, pipeline: Pipeline) -> bool:
        """Tell whether a pipeline may code this engine's cache; none may if it can't be carried."""
        return self._form is not None and self._form.carries(pipeline)

    def _make_ready(self, ready: ReadyTable) -> None:
        if self._warm_up is not None:
            self._warm_up.of_table(ready)


def _secrets(config: ConnectorConfig) -> Callable[[], Sequence[bytes]]:
    """Return what tells this deployment's secrets, as new as their file."""
    if not config.credentials:
        return no_secrets
    credentials = Credentials(config.credentials, PATH, serves=False)
    return lambda: credentials.current().secrets
