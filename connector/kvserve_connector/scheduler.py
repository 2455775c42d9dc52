"""The half of the connector that lives in vLLM's scheduler: what to keep, what to fetch, what to let go."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from vllm.v1.request import RequestStatus

from kvserve_api.errors import SpecError
from kvserve_connector import tracing
from kvserve_connector.engine import Engine
from kvserve_connector.handover import Lease, Load, Prefill, Progress
from kvserve_connector.metadata import ServerAddress, StepMetadata
from kvserve_connector.prompts import digest, stored_prompt, transfer_id, transferable, workload
from kvserve_connector.remote import Remote
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.messages import StoreNews
from kvserve_connector.stores.requests import StoreRequests

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_SHORTENED = "kvserve_shortened"


class SchedulerHalf:
    """Decides for each request; does no I/O.

    Args:
        engine: The engine's facts.
        is_producer: This engine prefills for others.
        is_consumer: This engine fetches the KV of others.
        store: The KV store that it asks; None to have none.
        now_s: Wall clock, the same that vLLM stamps arrivals with.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        is_producer: bool,
        is_consumer: bool,
        store: StoreConfig | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._now_s = now_s
        self._address: ServerAddress | None = None
        self._ports: tuple[int, ...] = ()
        self._step = StepMetadata()
        self._present: set[str] = set()
        self._loading: set[str] = set()
        self._prefilling: dict[str, Request] = {}
        self._followed: dict[str, Progress] = {}
        self._store: StoreRequests | None = None
        if store is not None and engine.layout is not None:
            saves = store.save and is_producer
            self._store = StoreRequests(store, saves=saves, prompt=stored_prompt)

    def set_addresses(self, addresses: Sequence[ServerAddress]) -> None:
        """Take note of where the transfer servers of the workers listen, in order of their ranks."""
        self._address = addresses[0]
        self._ports = tuple(address.port for address in addresses) if len(addresses) > 1 else ()

    def arrived(self, request: "Request") -> None:
        """Announce a prefill for a consumer, and leave to it what it must compute itself; or announce a consumer."""
        self._present.add(request.request_id)
        if self._store is not None:
            self._store.arrived(request)
        if (remote := self._remote(request)) is not None:
            self._step.wanted.append(remote)
        params = request.kv_transfer_params
        if not (self._is_producer and params and params.get("do_remote_decode") is True):
            return
        self._shorten(request, params)
        if self._address is None or not transferable(request):
            return
        self._prefilling[request.request_id] = request
        self._step.prefills.append(
            Prefill(
                request_id=request.request_id,
                transfer_id=transfer_id(params),
                tokens=request.num_prompt_tokens,
                prompt_digest=digest(request, request.num_prompt_tokens),
                workload=workload(request),
            )
        )

    def scheduled(self, output: "SchedulerOutput") -> None:
        """Tell how far each prefill for a consumer will be after the step that was scheduled."""
        self._step.idle = not output.num_scheduled_tokens
        if self._store is not None:
            self._store.scheduled(output)
        blocks = output.kv_connector_block_state
        if not self._prefilling or blocks is None:
            return
        for request_id in output.preempted_req_ids or ():
            if self._followed.pop(request_id, None) is not None:
                self._step.preempted.append(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            request = self._prefilling.get(request_id)
            block_ids = None if request is None else blocks.get_block_ids(request_id)
            if request is None or block_ids is None:
                continue
            total = request.num_prompt_tokens
            tokens = min(request.num_computed_tokens + count, total)
            held = self._held(block_ids, tokens)
            known = self._followed.get(request_id)
            if known is not None:
                if _continues(known, min(request.num_computed_tokens, total), held):
                    if known.tokens == total:
                        continue
                else:
                    # what was computed turned out to be of no use, or lies elsewhere now
                    self._step.preempted.append(request_id)
            progress = Progress(
                request_id=request_id,
                block_ids=held,
                tokens=tokens,
                before=min(request.num_computed_tokens, total),
            )
            self._followed[request_id] = progress
            self._step.progress.append(progress)

    def _shorten(self, request: "Request", params: dict[str, Any]) -> None:
        """Take off a prompt's end what its consumer computes itself."""
        held_back = self._engine.held_back
        # once only: a request that was preempted arrives again
        if not held_back or params.get(_SHORTENED) or request.num_prompt_tokens <= held_back:
            return
        if not transferable(request) or request.get_skip_reading_prefix_cache():
            return
        params[_SHORTENED] = True
        del request.prompt_token_ids[-held_back:]
        del request._all_token_ids[-held_back:]
        request.num_prompt_tokens -= held_back
        request.max_tokens = 1

    def matched_tokens(self, request: "Request", computed: int) -> tuple[int | None, bool]:
        """Return how many tokens beyond the computed ones can be fetched, and whether asynchronously.

        It is not known (None) while the store is being asked.
        """
        remote = self._remote(request)
        if remote is None or not self._fits(request, remote):
            stored = 0 if self._store is None else self._store.matched_tokens(request, computed)
            return stored, bool(stored)
        wanted = self._fetchable(request) - computed
        return (wanted, True) if wanted > 0 else (0, False)

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """Start the fetch that `matched_tokens` offered, now that the blocks are there."""
        remote = self._remote(request)
        if self._store is not None and (remote is None or not self._fits(request, remote)):
            if external:
                self._loading.add(request.request_id)
            self._store.allocated(request, blocks.get_block_ids()[0], external)
            external = 0
        elif self._store is not None:
            self._store.foreign(request)
        if remote is None:
            return
        # the hand-over happens once, whatever becomes of it
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["do_remote_prefill"] = False
        if external == 0:
            self._step.releases.append(remote)
            return
        total = self._fetchable(request)
        self._loading.add(request.request_id)
        self._step.loads.append(
            Load(
                request_id=request.request_id,
                remote=remote,
                tokens=range(total - external, total),
                prompt_digest=digest(request, total),
                block_ids=self._held(blocks.get_block_ids(), total),
                workload=workload(request),
            )
        )

    def finished(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Say whether a finished request's blocks must be kept, and what its answer tells the consumer."""
        self._present.discard(request.request_id)
        if request.request_id in self._loading:
            self._loading.discard(request.request_id)
            self._step.cancelled.append(request.request_id)
        self._followed.pop(request.request_id, None)
        announced = self._prefilling.pop(request.request_id, None) is not None
        kept, answer = self._end(request, block_ids)
        if announced and not kept:
            self._step.stopped.append(request.request_id)
        read = self._store is not None and self._store.finished(request)
        return kept or read, answer

    def _end(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params or {}
        if (remote := self._remote(request)) is not None:
            # aborted before it was scheduled, or refused by the front end, which then finishes a stand-in with the
            # same parameters: without us the producer would wait for its lease to end
            params["do_remote_prefill"] = False
            self._step.releases.append(remote)
            return False, None
        whole = request.status in (
            RequestStatus.FINISHED_LENGTH_CAPPED,
            RequestStatus.FINISHED_STOPPED,
        )
        tokens = min(request.num_prompt_tokens, request.num_computed_tokens)
        wanted = self._is_producer and params.get("do_remote_decode") is True and whole
        if not (wanted and tokens and transferable(request)):
            return False, None
        if self._address is None:
            self._step.unserved += 1
            return False, None
        held = self._held(block_ids, tokens)
        return True, self._keep(request, self._address, tokens, held).to_params(held)

    def received(self, request_ids: set[str]) -> None:
        """Take note of fetches that ended, well or badly."""
        self._loading -= request_ids

    def heard(self, news: StoreNews) -> None:
        """Take note of what the worker half says of the store."""
        if self._store is not None:
            self._store.heard(news)

    def take_step(self) -> StepMetadata:
        """Return the news since the last call."""
        step, self._step = self._step, StepMetadata()
        step.requests = len(self._present - self._loading)
        if self._store is not None:
            step.store = self._store.take_step()
        return step

    def _held(self, block_ids: Sequence[Sequence[int]], tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return for each group that is carried the blocks of a request that holds so many tokens."""
        return tuple(group.held(block_ids[group.index], tokens) for group in self._engine.groups)

    def _fetchable(self, request: "Request") -> int:
        """Return how many tokens of a prompt its prefill elsewhere computes."""
        total: int = request.num_prompt_tokens
        return max(0, total - self._engine.held_back)

    def _keep(
        self,
        request: "Request",
        address: ServerAddress,
        tokens: int,
        held: tuple[tuple[int, ...], ...],
    ) -> Remote:
        """Have the worker keep a finished prefill's blocks; return where they are."""
        now_s = self._now_s()
        span = tracing.prefill_span(request.trace_headers, request.arrival_time, now_s, tokens)
        self._step.leases.append(
            Lease(
                request_id=request.request_id,
                tokens=tokens,
                prompt_digest=digest(request, tokens),
                block_ids=held,
                workload=workload(request),
                model_s=max(0.0, now_s - request.arrival_time),
            )
        )
        return Remote(
            host=address.host,
            port=address.port,
            engine_id=self._engine.engine_id,
            request_id=request.request_id,
            tokens=tokens,
            traceparent=tracing.traceparent(trace.set_span_in_context(span)),
            ports=self._ports,
        )

    def _remote(self, request: "Request") -> Remote | None:
        """Return where the request's KV waits; None if it is not to be fetched from anywhere."""
        params = request.kv_transfer_params
        if not (self._is_consumer and params and params.get("do_remote_prefill") is True):
            return None
        try:
            return Remote.from_params(params)
        except SpecError as error:
            logger.warning("request %s is computed here: %s", request.request_id, error)
            params["do_remote_prefill"] = False
            return None

    def _fits(self, request: "Request", remote: Remote) -> bool:
        """Tell whether what waits there can be this request's KV."""
        fetchable = self._fetchable(request)
        if remote.ranks != self._engine.ranks:
            logger.warning(
                "request %s is computed here: its prefill has tensor_parallel_size %d, this engine %d",
                request.request_id,
                remote.ranks,
                self._engine.ranks,
            )
            return False
        if remote.transfer:
            # how many tokens it has is compared when it is pulled
            return transferable(request) and fetchable > 0
        # of a prompt that is too short to be held back, the prefill holds what is of no use
        if transferable(request) and (remote.tokens == fetchable or fetchable == 0):
            return True
        logger.warning(
            "request %s is computed here: its prefill holds %d tokens, of its prompt %d are wanted",
            request.request_id,
            remote.tokens,
            fetchable,
        )
        return False


def _continues(known: Progress, computed: int, block_ids: tuple[tuple[int, ...], ...]) -> bool:
    """Tell whether a prefill still has what it was known to have, in the same blocks."""
    return computed >= known.tokens and all(
        now[: len(before)] == before for before, now in zip(known.block_ids, block_ids, strict=True)
    )
