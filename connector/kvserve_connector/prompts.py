"""What vLLM's requests say of their prompts: identity, workload class, and whether they can be transferred at all."""

from typing import TYPE_CHECKING, Any

from kvserve_api.names import XARG_WORKLOAD
from kvserve_api.profile_set import DEFAULT_CLASS, NAME_PATTERN
from kvserve_connector import tracing
from kvserve_connector.handover import prompt_digest
from kvserve_connector.remote import MAX_ID, TRANSFER_KEY
from kvserve_connector.stores.messages import Prompt
from kvserve_connector.stores.requests import pack_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request


def transferable(request: "Request") -> bool:
    """Tell whether the prompt is known by its tokens; one given as embeddings has no identity to compare."""
    return request.prompt_token_ids is not None and getattr(request, "prompt_embeds", None) is None


def transfer_id(params: dict[str, Any]) -> str | None:
    """Return the name by which a router tells a consumer of a prefill; None if it does not, or not as one can."""
    name = params.get(TRANSFER_KEY)
    return name if isinstance(name, str) and 0 < len(name) <= MAX_ID else None


def _extras(request: "Request") -> list[str]:
    """Return everything besides its tokens that a prompt's KV depends on."""
    extras = [feature.identifier for feature in request.mm_features or ()]
    if request.lora_request is not None:
        extras.append(request.lora_request.lora_name)
    return extras


def digest(request: "Request", tokens: int) -> str:
    """Return the identity of a prompt's first tokens, with everything besides them that their KV depends on."""
    assert request.prompt_token_ids is not None
    return prompt_digest(request.prompt_token_ids[:tokens], _extras(request))


def stored_prompt(request: "Request") -> Prompt | None:
    """Return a request's prompt as a store knows it; None if it has no identity.

    What a store holds outlives engines, so an adapter is also told by its path; and a salt keeps tenants apart.
    """
    if not transferable(request):
        return None
    extras = _extras(request)
    if request.lora_request is not None:
        extras.append(request.lora_request.lora_path)
    if request.cache_salt:
        extras.append(f"salt {request.cache_salt}")
    return Prompt(
        request_id=request.request_id,
        tokens=pack_tokens(request.prompt_token_ids),
        extras=tuple(extras),
        workload=workload(request),
        traceparent=tracing.request_header(request.trace_headers),
    )


def workload(request: "Request") -> str:
    """Return the request's workload class; a name that can't be one counts as the default."""
    sampling = request.sampling_params
    extra = (sampling.extra_args if sampling is not None else None) or {}
    name = extra.get(XARG_WORKLOAD, DEFAULT_CLASS)
    return name if isinstance(name, str) and NAME_PATTERN.fullmatch(name) else DEFAULT_CLASS
