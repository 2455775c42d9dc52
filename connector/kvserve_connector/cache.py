"""An engine's KV cache, opened for transfers: plain keys and values where its layout is known, else whole blocks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from kvserve_api.canonical import digest
from kvserve_api.errors import SpecError, UnsupportedError, WireError, WireReason
from kvserve_api.wire import BYTES, FLOAT_DTYPES, KVLayout
from kvserve_connector.chunks import Chunk
from kvserve_connector.engine import Engine
from kvserve_connector.form import Form, Part
from kvserve_connector.groups import Group, Opaque, Reach
from kvserve_connector.layout import (
    Writer,
    learn_orders,
    split_content,
    split_halves,
)
from kvserve_connector.paged import PagedCache
from kvserve_connector.views import BlockView, LayerView

logger = logging.getLogger(__name__)

CONTENT_BACKENDS: Final = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"})
"""Attention backends whose cache holds key then value in the last dimension."""
NULL_BLOCK: Final = 0
"""The block that vLLM names where a request has none."""
_ROW_VALUES: Final = 4096
"""Values of a head of an opaque row that is too long for one."""


class EngineCache:
    """All parts of an engine's cache.

    Reading and writing are safe from any thread as long as nobody else writes the same blocks.

    Args:
        form: How it is cut.
        parts: The cache of each part.
        device: Where it is.
    """

    def __init__(
        self, form: Form, parts: Sequence[PagedCache], device: torch.device | None = None
    ) -> None:
        self.form = form
        self._parts = parts
        self._device = device or torch.device("cpu")
        groups = list(dict.fromkeys(part.group.index for part in form.parts))
        self._lists = [groups.index(part.group.index) for part in form.parts]

    @property
    def at_once(self) -> bool:
        """Whether what a layer has written is there when its call returns; on a GPU it is not."""
        return self._device.type == "cpu"

    def fence(self) -> Callable[[], None]:
        """Return what waits, in another thread, until all that the engine has begun to write is there."""
        if self._device.type != "cuda":
            return _no_wait
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def read(
        self, chunk: Chunk, block_ids: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a chunk's keys and values out of the cache.

        Args:
            chunk: Which layers and rows of which part.
            block_ids: The request's blocks by group, see `kvserve_connector.groups.Group.held`.

        Returns:
            Each ``[layers, rows, heads, dim]``, contiguous, on the CPU.

        Raises:
            WireError: The request does not hold these blocks any more.
        """
        ids = self._ids(chunk, block_ids)
        return self._parts[chunk.part].read(chunk.layers, chunk.tokens, ids)

    def write(
        self,
        chunk: Chunk,
        block_ids: Sequence[Sequence[int]],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Copy a chunk's keys and values into the cache; see `read`."""
        ids = self._ids(chunk, block_ids)
        self._parts[chunk.part].write(chunk.layers, chunk.tokens, ids, keys, values)

    def _ids(self, chunk: Chunk, block_ids: Sequence[Sequence[int]]) -> Sequence[int]:
        part = self.form.parts[chunk.part]
        ids = block_ids[self._lists[chunk.part]]
        first, last = (
            chunk.tokens.start // part.block_rows,
            -(-chunk.tokens.stop // part.block_rows),
        )
        wanted = ids[first:last]
        if len(wanted) < last - first or (part.whole_blocks and NULL_BLOCK in wanted):
            raise WireError(
                WireReason.RANGE_MISMATCH,
                f"the request does not hold blocks {first} to {last - 1} of {part.group.layer_names[0]}",
            )
        return ids


def _no_wait() -> None:
    """Return: a CPU has written when its call returns."""


def open_cache(
    engine: Engine,
    kv_caches: Mapping[str, torch.Tensor],
    attention_layers: Mapping[str, Any],
    rank: int = 0,
) -> EngineCache:
    """View the engine's cache in rows that can be carried.

    Args:
        engine: The engine's facts.
        kv_caches: vLLM's tensors by layer name; their first dimension are blocks, or equal parts of blocks.
        attention_layers: vLLM's attention layers by name.
        rank: Which of the engine's tensor-parallel workers this is.

    Raises:
        UnsupportedError: The cache can't be carried, not even block by block.
    """
    if engine.unsupported:
        raise UnsupportedError(engine.unsupported)
    for group in engine.groups:
        for name in group.layer_names:
            if name not in kv_caches:
                raise UnsupportedError(f"no KV cache was registered for layer {name}")
    if engine.layout is not None:
        try:
            return _open_plain(engine, engine.layout, kv_caches, attention_layers, rank)
        except UnsupportedError as error:
            logger.warning("%s; it is carried as whole blocks", error)
            engine = replace(engine, layout=None, opaque=Opaque.BACKEND)
    return _open_blocks(engine, kv_caches, attention_layers, rank)


def _open_plain(
    engine: Engine,
    layout: KVLayout,
    kv_caches: Mapping[str, torch.Tensor],
    attention_layers: Mapping[str, Any],
    rank: int,
) -> EngineCache:
    """View keys and values, ``[blocks, heads, block_tokens, 2 * head_dim]``, in canonical order."""
    group = engine.groups[0]
    step = group.block_tokens
    expected = (layout.kv_heads, step, 2 * layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    views: list[LayerView] = []
    orders: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in group.layer_names:
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
    part = Part(layout=layout, group=group, block_rows=step)
    form = Form(fingerprint=engine.fingerprint, parts=(part,), rank=rank, ranks=engine.ranks)
    device = kv_caches[group.layer_names[0]].device
    return EngineCache(form, [PagedCache(views, layout, step)], device)


def _open_blocks(
    engine: Engine,
    kv_caches: Mapping[str, torch.Tensor],
    attention_layers: Mapping[str, Any],
    rank: int,
) -> EngineCache:
    """View whole blocks, of which nothing is known but their size."""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    parts: list[Part] = []
    caches: list[PagedCache] = []
    described: list[object] = [_vllm_version()]
    if any(group.reach == Reach.STATE for group in engine.groups):
        described.append(get_conv_state_layout())
    for group, content in zip(engine.groups, engine.content, strict=True):
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in group.layer_names:
            cache = kv_caches[name]
            if cache.shape[0] % engine.blocks:
                raise UnsupportedError(
                    f"the cache of layer {name}, {tuple(cache.shape)}, is not cut into"
                    f" {engine.blocks} blocks"
                )
            shape = tuple(group_kernel_blocks(cache, engine.blocks).shape[1:])
            alike.setdefault((shape, cache.dtype), []).append(name)
            described.append([name, content, *_described(attention_layers[name])])
        for (_, _), names in alike.items():
            tensors = [group_kernel_blocks(kv_caches[name], engine.blocks) for name in names]
            part, views = _opaque_part(replace(group, layer_names=tuple(names)), tensors)
            parts.append(part)
            caches.append(PagedCache(views, part.layout, part.block_rows))
    form = Form(
        fingerprint=engine.fingerprint,
        parts=tuple(parts),
        opaque=engine.opaque,
        blocks=digest({"layers": described}),
        rank=rank,
        ranks=engine.ranks,
    )
    return EngineCache(form, caches)


def _opaque_part(group: Group, tensors: Sequence[torch.Tensor]) -> tuple[Part, list[LayerView]]:
    """Cut blocks ``[blocks, …]`` of equal layers into rows: their states where they hold numbers, else one of bytes."""
    first = tensors[0]
    dtype = str(first.dtype).removeprefix("torch.")
    views: list[LayerView]
    try:
        if (
            dtype in FLOAT_DTYPES
            and group.reach != Reach.STATE
            and first.dim() == 4
            and first.shape[3] % 2 == 0
        ):
            dim = first.shape[3] // 2
            layout = KVLayout(
                layers=len(tensors), kv_heads=first.shape[1], head_dim=dim, dtype=dtype
            )
            views = [split_content(tensor, dim) for tensor in tensors]
            rows = first.shape[2]
        else:
            half_bytes = -(-first[0].numel() * first.element_size() // 2)
            dim = half_bytes if half_bytes <= _ROW_VALUES else _ROW_VALUES
            layout = KVLayout(
                layers=len(tensors), kv_heads=-(-half_bytes // dim), head_dim=dim, dtype=BYTES
            )
            views = [BlockView(tensor, layout.kv_heads, dim) for tensor in tensors]
            rows = 1
    except SpecError as error:
        raise UnsupportedError(
            f"blocks of form {tuple(first.shape[1:])} can't be carried: {error}"
        ) from error
    return Part(layout=layout, group=group, block_rows=rows, whole_blocks=True), views


def _described(layer: Any) -> tuple[str, ...]:
    """Return what decides how a layer lays out its blocks, and what their numbers mean."""
    scales = [str(getattr(layer, name, "")) for name in ("_k_scale_float", "_v_scale_float")]
    return (layer.get_attn_backend().get_name(), str(getattr(layer, "isa", "")), *scales)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


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
