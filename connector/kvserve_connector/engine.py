"""What the connector must know of the vLLM engine it lives in, and how to open its KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_connector.layout import (
    LayerView,
    PagedCache,
    Writer,
    learn_orders,
    split_content,
    split_halves,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

CONTENT_BACKENDS = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"})
"""Attention backends whose cache holds key then value in the last dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """The facts of one engine that both halves of the connector share.

    Attributes:
        layout: Form of its KV cache.
        layer_names: Its layers with a KV cache, in model order.
        block_tokens: Tokens in a block.
        fingerprint: Identity of the model.
        engine_id: Identity of this run of the engine; another after each restart.
    """

    layout: KVLayout
    layer_names: tuple[str, ...]
    block_tokens: int
    fingerprint: str
    engine_id: str


def inspect(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> Engine:
    """Return the engine's facts.

    Raises:
        UnsupportedError: The model or its parallel layout is one that can't be transferred; the text says which.
    """
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVQuantMode,
        MLAAttentionSpec,
        iter_layer_specs,
    )

    parallel = vllm_config.parallel_config
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) != 1:
            raise UnsupportedError(
                f"{name} must be 1 with KVServeConnector, is {getattr(parallel, name)}"
            )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedError(
            f"a model with {len(groups)} KV cache groups can't be transferred; only full attention in"
            " all layers is supported"
        )
    group = groups[0]
    specs = set(iter_layer_specs(group.kv_cache_spec))
    if len(specs) != 1:
        raise UnsupportedError("all layers must have the same KV heads, head size and dtype")
    spec: Any = specs.pop()
    if not isinstance(spec, FullAttentionSpec) or isinstance(spec, MLAAttentionSpec):
        raise UnsupportedError(
            f"only full attention can be transferred, this is {type(spec).__name__}"
        )
    if spec.kv_quant_mode != KVQuantMode.NONE or spec.state_content_bytes is not None:
        raise UnsupportedError("a quantised KV cache can't be transferred: use kv_cache_dtype auto")
    if spec.head_size_v != spec.head_size or spec.num_heads != spec.num_kv_heads:
        raise UnsupportedError("keys and values must have the same size and one slot for each head")
    try:
        layout = KVLayout(
            layers=len(group.layer_names),
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=str(spec.dtype).removeprefix("torch."),
        )
    except SpecError as error:
        raise UnsupportedError(f"this KV cache can't be transferred: {error}") from error
    return Engine(
        layout=layout,
        layer_names=tuple(sorted(group.layer_names, key=_layer_index)),
        block_tokens=spec.block_size,
        fingerprint=model_fingerprint(vllm_config.model_config.hf_config.to_dict()),
        engine_id=str(vllm_config.kv_transfer_config.engine_id),
    )


def open_cache(
    engine: Engine, kv_caches: Mapping[str, torch.Tensor], attention_layers: Mapping[str, Any]
) -> PagedCache:
    """View the engine's cache in canonical order.

    Args:
        engine: The engine's facts.
        kv_caches: vLLM's tensors by layer name, ``[blocks, heads, block_tokens, 2 * head_dim]``.
        attention_layers: vLLM's attention layers by name.

    Raises:
        UnsupportedError: The cache has a form that is not known.
    """
    missing = [name for name in engine.layer_names if name not in kv_caches]
    if missing:
        raise UnsupportedError(f"no KV cache was registered for layer {missing[0]}")
    layout, step = engine.layout, engine.block_tokens
    expected = (layout.kv_heads, step, 2 * layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    views: list[LayerView] = []
    orders: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in engine.layer_names:
        cache = kv_caches[name]
        if tuple(cache.shape[1:]) != expected or cache.dtype != dtype:
            raise UnsupportedError(
                f"layer {name} has a cache of form {tuple(cache.shape)} {cache.dtype}; known is"
                f" [blocks, {', '.join(map(str, expected))}] {dtype}"
            )
        layer = attention_layers[name]
        backend = layer.get_attn_backend().get_name()
        if backend == "CPU_ATTN":
            isa = str(layer.isa)
            if isa not in orders:
                orders[isa] = learn_orders(_cpu_writer(isa), step, layout.head_dim, dtype)
            views.append(split_halves(cache, layout.head_dim, *orders[isa]))
        elif backend in CONTENT_BACKENDS:
            views.append(split_content(cache, layout.head_dim))
        else:
            raise UnsupportedError(f"the KV cache of attention backend {backend} is not known")
    return PagedCache(views, layout, step)


def _cpu_writer(isa: str) -> Writer:
    """Return vLLM's own write operation for one instruction set."""
    from vllm import _custom_ops

    def write(
        keys: torch.Tensor,
        values: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        _custom_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)

    return write


def _layer_index(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
