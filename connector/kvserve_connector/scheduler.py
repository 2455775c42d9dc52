"""The half of the connector that lives in vLLM's scheduler: what to keep, what to fetch, what to let go."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from vllm.v1.request import RequestStatus

from kvserve_api.errors import SpecError
from kvserve_api.names import XARG_WORKLOAD
from kvserve_api.profile_set import DEFAULT_CLASS, NAME_PATTERN
from kvserve_connector import tracing
from kvserve_connector.engine import Engine
from kvserve_connector.handover import Lease, Load, prompt_digest
from kvserve_connector.metadata import ServerAddress, StepMetadata
from kvserve_connector.remote import Remote

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class SchedulerHalf:
    """Decides for each request; does no I/O.

    Args:
        engine: The engine's facts.
        is_producer: This engine prefills for others.
        is_consumer: This engine fetches the KV of others.
        now_s: Wall clock, the same that vLLM stamps arrivals with.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        is_producer: bool,
        is_consumer: bool,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._now_s = now_s
        self._address: ServerAddress | None = None
        self._step = StepMetadata()
        self._loading: set[str] = set()

    def set_address(self, address: ServerAddress) -> None:
        """Take note of where the worker half's transfer server listens."""
        self._address = address

    def matched_tokens(self, request: "Request", computed: int) -> tuple[int, bool]:
        """Return how many tokens beyond the computed ones can be fetched, and whether asynchronously."""
        remote = self._remote(request)
        if remote is None or not self._fits(request, remote):
            return 0, False
        wanted = request.num_prompt_tokens - computed
        return (wanted, True) if wanted > 0 else (0, False)

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """Start the fetch that `matched_tokens` offered, now that the blocks are there."""
        remote = self._remote(request)
        if remote is None:
            return
        # the hand-over happens once, whatever becomes of it
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["do_remote_prefill"] = False
        if external == 0:
            self._step.releases.append(remote)
            return
        total = request.num_prompt_tokens
        self._loading.add(request.request_id)
        self._step.loads.append(
            Load(
                request_id=request.request_id,
                remote=remote,
                tokens=range(total - external, total),
                prompt_digest=_digest(request),
                block_ids=tuple(blocks.get_block_ids()[0]),
                workload=_workload(request),
            )
        )

    def finished(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Say whether a finished request's blocks must be kept, and what its answer tells the consumer."""
        if request.request_id in self._loading:
            self._loading.discard(request.request_id)
            self._step.cancelled.append(request.request_id)
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
        if not (wanted and tokens and _transferable(request)) or self._address is None:
            return False, None
        blocks = block_ids[0][: -(-tokens // self._engine.block_tokens)]
        return True, self._keep(request, self._address, tokens, blocks).to_params(blocks)

    def received(self, request_ids: set[str]) -> None:
        """Take note of fetches that ended, well or badly."""
        self._loading -= request_ids

    def take_step(self) -> StepMetadata:
        """Return the news since the last call."""
        step, self._step = self._step, StepMetadata()
        return step

    def _keep(
        self, request: "Request", address: ServerAddress, tokens: int, blocks: list[int]
    ) -> Remote:
        """Have the worker keep a finished prefill's blocks; return where they are."""
        now_s = self._now_s()
        span = tracing.prefill_span(request.trace_headers, request.arrival_time, now_s, tokens)
        self._step.leases.append(
            Lease(
                request_id=request.request_id,
                tokens=tokens,
                prompt_digest=_digest(request),
                block_ids=tuple(blocks),
                workload=_workload(request),
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
        if remote.tokens == request.num_prompt_tokens and _transferable(request):
            return True
        logger.warning(
            "request %s is computed here: its prefill holds %d tokens, its prompt has %d",
            request.request_id,
            remote.tokens,
            request.num_prompt_tokens,
        )
        return False


def _transferable(request: "Request") -> bool:
    """Tell whether the prompt is known by its tokens; one given as embeddings has no identity to compare."""
    return request.prompt_token_ids is not None and getattr(request, "prompt_embeds", None) is None


def _digest(request: "Request") -> str:
    """Return the prompt's identity, with everything besides its tokens that its KV depends on."""
    assert request.prompt_token_ids is not None
    extras = [feature.identifier for feature in request.mm_features or ()]
    if request.lora_request is not None:
        extras.append(request.lora_request.lora_name)
    return prompt_digest(request.prompt_token_ids, extras)


def _workload(request: "Request") -> str:
    """Return the request's workload class; a name that can't be one counts as the default."""
    sampling = request.sampling_params
    extra = (sampling.extra_args if sampling is not None else None) or {}
    name = extra.get(XARG_WORKLOAD, DEFAULT_CLASS)
    return name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else DEFAULT_CLASS
