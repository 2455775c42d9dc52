"""What the connector must know of the vLLM engine it lives in."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.wire import FLOAT_DTYPES, KVLayout, model_fingerprint
from kvserve_connector.groups import Group, Opaque, Reach

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

HELD_BACK: Final = 1
"""Tokens that a prefill leaves to its consumer where a layer keeps no more than the next token needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """The facts of one engine that both halves of the connector share.

    Attributes:
        groups: Its groups of layers with a cache.
        layout: Form of its KV cache; None unless it is keys and values of one size in all layers.
        opaque: Why it is not; None if it is.
        blocks: Blocks of its cache.
        content: What vLLM says of the content of each group's blocks; equal where blocks mean the same.
        fingerprint: Identity of the model.
        engine_id: Identity of this run of the engine; another after each restart.
        ranks: Tensor-parallel workers; each has a slice of the cache, of the same form.
        step_tokens: Most tokens that it computes in one step.
        splits_steps: Whether a step may run in several parts, so that a layer is written more than once.
        unsupported: Why nothing of it can be carried; empty if something can.
    """

    groups: tuple[Group, ...]
    layout: KVLayout | None
    opaque: Opaque | None = None
    blocks: int = 0
    content: tuple[str, ...] = ()
    fingerprint: str
    engine_id: str
    ranks: int = 1
    step_tokens: int = 2048
    splits_steps: bool = False
    unsupported: str = ""

    @property
    def held_back(self) -> int:
        """Tokens at a prompt's end that a prefill does not compute.

        The consumer computes the last token itself, to go on from it. A recurrent state or a window that has moved
        past that token would be one too far.
        """
        return HELD_BACK if any(group.reach != Reach.ALL for group in self.groups) else 0


def inspect(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> Engine:
    """Return the engine's facts; a cache that can't be carried is one of them.

    Raises:
        UnsupportedError: The model is split over several workers by other than tensor parallelism; the text says how.
    """
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) != 1:
            raise UnsupportedError(
                f"{name} must be 1 with KVServeConnector, is {getattr(parallel, name)}"
            )
    facts: dict[str, Any] = {
        "fingerprint": model_fingerprint(vllm_config.model_config.hf_config.to_dict()),
        "engine_id": str(vllm_config.kv_transfer_config.engine_id),
        "blocks": kv_cache_config.num_blocks,
        "ranks": parallel.tensor_parallel_size,
        "step_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "splits_steps": bool(getattr(parallel, "use_ubatching", False)),
    }
    try:
        groups = tuple(
            _group(index, kv_cache_config.kv_cache_groups[index])
            for index in kv_cache_config.transfer_group_ids
        )
    except UnsupportedError as error:
        return Engine(groups=(), layout=None, unsupported=str(error), **facts)
    if not groups:
        return Engine(groups=(), layout=None, unsupported="it has no KV cache", **facts)
    specs = [group.kv_cache_spec for group in kv_cache_config.transfer_groups]
    known = _layout(groups, specs)
    return Engine(
        groups=groups,
        layout=known if isinstance(known, KVLayout) else None,
        opaque=known if isinstance(known, Opaque) else None,
        content=tuple(repr(spec) for spec in specs),
        **facts,
    )


def _group(index: int, group: Any) -> Group:
    """Read one of vLLM's groups.

    Raises:
        UnsupportedError: What its blocks hold, or for how long, is not known.
    """
    from vllm.v1 import kv_cache_interface as vllm

    names = tuple(sorted(group.layer_names, key=_layer_index))
    specs = {type(spec) for spec in vllm.iter_layer_specs(group.kv_cache_spec)}
    spec = next(iter(vllm.iter_layer_specs(group.kv_cache_spec)))
    facts: dict[str, Any] = {
        "index": index,
        "layer_names": names,
        "block_tokens": group.kv_cache_spec.block_size,
    }
    # by exact type: what derives from one of these may keep something else
    if group.host_resident or group.kv_cache_spec.prefix_replay_tokens:
        pass
    elif specs <= {vllm.FullAttentionSpec, vllm.MLAAttentionSpec}:
        return Group(**facts)
    elif specs <= {vllm.SlidingWindowSpec, vllm.SlidingWindowMLASpec}:
        spans = {
            each.sliding_window + each.extra_retained_tokens
            for each in vllm.iter_layer_specs(group.kv_cache_spec)
        }
        return Group(**facts, reach=Reach.WINDOW, span=max(spans))
    elif specs == {vllm.ChunkedLocalAttentionSpec}:
        return Group(**facts, reach=Reach.CHUNK, span=spec.attention_chunk_size)
    elif specs == {vllm.MambaSpec}:
        return Group(**facts, reach=Reach.STATE, spare_blocks=spec.num_speculative_blocks)
    kinds = " and ".join(sorted(kind.__name__ for kind in specs))
    raise UnsupportedError(f"how {kinds} keeps its blocks is not known: {names[0]}")


def _layout(groups: tuple[Group, ...], group_specs: list[Any]) -> KVLayout | Opaque:
    """Return the form of a cache of plain keys and values, or why it is none."""
    from vllm.v1 import kv_cache_interface as vllm

    specs = {spec for group in group_specs for spec in vllm.iter_layer_specs(group)}
    if any(isinstance(spec, vllm.MambaSpec) for spec in specs):
        return Opaque.STATE
    # what is left are attention's
    if any(
        spec.kv_quant_mode != vllm.KVQuantMode.NONE or spec.state_content_bytes is not None
        for spec in specs
    ):
        return Opaque.QUANTISED
    if any(spec.head_size_v == 0 for spec in specs):
        return Opaque.MLA
    if any(group.reach != Reach.ALL for group in groups):
        return Opaque.WINDOW
    if len(groups) > 1:
        return Opaque.GROUPS
    spec: Any = next(iter(specs))
    dtype = str(spec.dtype).removeprefix("torch.")
    heads = (spec.num_heads, spec.head_size_v, spec.tokens_per_state)
    if (
        len(specs) > 1
        or heads != (spec.num_kv_heads, spec.head_size, 1)
        or dtype not in FLOAT_DTYPES
    ):
        return Opaque.UNEVEN
    try:
        return KVLayout(
            layers=len(groups[0].layer_names),
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=dtype,
        )
    except SpecError:
        return Opaque.UNEVEN


def _layer_index(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
