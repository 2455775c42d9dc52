"""KVServe's KV connector for vLLM: compressed prefill/decode hand-over.

Name it in ``--kv-transfer-config``: ``"kv_connector": "KVServeConnector"``, ``"kv_connector_module_path":
"kvserve_connector.connector"``. vLLM makes one instance in its scheduler and one in its worker; each delegates to its
half.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvserve_api import otel
from kvserve_api.errors import SpecError
from kvserve_connector.bootstrap import BootstrapServer, page
from kvserve_connector.config import PATH, ConnectorConfig
from kvserve_connector.engine import inspect
from kvserve_connector.remote import engine_name
from kvserve_connector.versions import doubts, needing_vllm, vllm_version

# another vLLM may lack a name, and its own error would not say which has it
with needing_vllm():
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.utils.network_utils import get_ip
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from kvserve_connector.metadata import ServerAddress, StepMetadata, WorkerNews
    from kvserve_connector.scheduler import SchedulerHalf
    from kvserve_connector.stats import PromMetrics, Stats
    from kvserve_connector.stores.weights import weights_of
    from kvserve_connector.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)
_PACKAGE = "kvserve_connector"


class KVServeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """What vLLM sees; see the base class for the meaning and order of the calls.

    Raises:
        SpecError: ``kv_connector_extra_config`` is wrong; the error names the key.
        UnsupportedError: The model or its parallel layout can't be transferred.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _join_log()
        if doubt := doubts(vllm_version() or ""):
            logger.warning(doubt)
        transfer = self._kv_transfer_config
        config = ConnectorConfig.read(transfer.kv_connector_extra_config, os.environ, get_ip())
        engine = inspect(vllm_config, kv_cache_config)
        roles = {
            "is_producer": transfer.is_kv_producer,
            "is_consumer": transfer.is_kv_consumer,
        }
        if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "recompute":
            logger.warning(
                'kv_load_failure_policy is "fail": a transfer that does not arrive fails its request;'
                ' set it to "recompute" to compute it here instead'
            )
        self._close_telemetry = otel.configure(f"kvserve-{transfer.kv_role}")
        self._config = config
        self._engine_id = engine.engine_id
        self._ranks = engine.ranks
        self._bootstrap: BootstrapServer | None = None
        if config.store is not None and engine.ranks > 1:
            logger.warning(
                "the KV store is left alone: tensor-parallel workers can't share one yet"
            )
            config = replace(config, store=None)
        if config.store is not None and transfer.kv_load_failure_policy != "recompute":
            raise SpecError(
                "kv_load_failure_policy",
                'must be "recompute" with a KV store: what is evicted while it is read would fail its request',
            )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            # vLLM takes bad blocks by their ids, which are only unique within a group
            single = len(kv_cache_config.kv_cache_groups) == 1
            self._scheduler = SchedulerHalf(engine, store=config.store if single else None, **roles)
        else:
            rank = get_tensor_model_parallel_rank() if engine.ranks > 1 else 0
            weights = _weights(config, vllm_config)
            self._worker = WorkerHalf(
                config.of_rank(rank), engine, rank=rank, weights=weights, **roles
            )

    # The scheduler's half.

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn where the workers' transfer servers listen."""
        addresses = [metadata[rank] for rank in sorted(metadata)]
        known = [address for address in addresses if isinstance(address, ServerAddress)]
        if known and len(known) == self._ranks:
            self._half_of_scheduler.set_addresses(known)
            self._serve_bootstrap(known)

    def on_new_request(self, request: "Request") -> None:
        """Announce a prefill for a consumer, and leave the end of its prompt to it where the model asks for that."""
        self._half_of_scheduler.arrived(request)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        """Return all transferred groups: a request's own blocks are fetched."""
        ids: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return ids

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Offer the whole prompt where a prefill elsewhere holds it, or what a KV store has; always asynchronously."""
        return self._half_of_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """Plan the fetch into the blocks that were allocated for it."""
        self._half_of_scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """Return this step's news for the worker."""
        self._half_of_scheduler.scheduled(scheduler_output)
        return self._half_of_scheduler.take_step()

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take note of fetches that ended, and of what the worker half says."""
        news = connector_output.kv_connector_worker_meta
        if isinstance(news, WorkerNews):
            self._half_of_scheduler.heard(news.store)
        self._half_of_scheduler.received(set(connector_output.finished_recving or ()))

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep a prefill's blocks for its consumer, and say in the answer where they are."""
        return self._half_of_scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        return self._half_of_scheduler.finished(request, block_ids)

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the cache and begin to serve."""
        layers = self._vllm_config.compilation_config.static_forward_context
        self._half_of_worker.open(kv_caches, layers)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return where the transfer server listens; None without one."""
        return self._half_of_worker.address

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Let go of blocks that are no longer a request's, before anyone writes into them."""
        if isinstance(kv_connector_metadata, StepMetadata):
            self._half_of_worker.let_go(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Start what the step brings, before its forward pass: on a CPU that can take seconds."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, StepMetadata):
            self._half_of_worker.take(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Do nothing: loads are under way since the metadata came."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request runs when all its layers are there."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: "AttentionMetadata",
        **kwargs: Any,
    ) -> None:
        """Take note that a layer of the running prefills is in the cache; called after it was written there."""
        self._half_of_worker.layer_written(layer_name)

    def wait_for_save(self) -> None:
        """Take note that the step is in the cache; nothing waits."""
        self._half_of_worker.step_written()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return which requests were sent, were received, or must be recomputed."""
        return self._half_of_worker.results()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of received requests whose tokens must be computed."""
        return self._half_of_worker.take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Return what the KV store answered since the last step."""
        news = self._half_of_worker.take_news()
        return None if news is None else WorkerNews(store=news)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Return what the worker counted since the last step."""
        totals = {} if self._worker is None else self._worker.take_totals()
        return Stats(data=totals) if totals else None

    def shutdown(self) -> None:
        """End what runs in threads."""
        if self._worker is not None:
            self._worker.close()
        if self._bootstrap is not None:
            self._bootstrap.close()
        self._close_telemetry()

    # Of the class, for the front end.

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Return statistics from their plain form."""
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Return the counters of vLLM's Prometheus page."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _serve_bootstrap(self, addresses: Sequence[ServerAddress]) -> None:
        """Let routers look up the engine, if that is wanted.

        Raises:
            SpecError: The port is taken.
        """
        port, host = self._config.bootstrap_port, self._config.listen_host
        if port is None or self._bootstrap is not None:
            return
        ports = [address.port for address in addresses]
        answer = page(
            self._vllm_config.parallel_config.data_parallel_rank,
            engine_name(self._engine_id, addresses[0].host, ports),
            {rank: f"{each.host}:{each.port}" for rank, each in enumerate(addresses)},
        )
        try:
            self._bootstrap = BootstrapServer(host, port, answer)
        except OSError as error:
            raise SpecError(
                f"{PATH}.bootstrap_port", f"can't listen on {host}:{port}: {error}"
            ) from error
        logger.info("routers look this engine up on port %d", self._bootstrap.port)

    @property
    def _half_of_scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _half_of_worker(self) -> WorkerHalf:
        assert self._worker is not None
        return self._worker


# by its name alone MultiConnector looks up whose statistics came; who has registered it already means the same class
with suppress(ValueError):
    KVConnectorFactory.register_connector(
        KVServeConnector.__name__, __name__, KVServeConnector.__name__
    )


def _weights(config: ConnectorConfig, vllm_config: "VllmConfig") -> str:
    """Return the name of the weights; empty without a store that needs it."""
    if config.store is None:
        return ""
    return config.store.weights or weights_of(vllm_config)


def _join_log() -> None:
    """Let our messages appear where vLLM's do, at the same level; left alone if someone has set ours up."""
    ours, theirs = logging.getLogger(_PACKAGE), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate
