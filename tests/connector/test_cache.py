"""Caches that are carried as whole blocks, in tensors as vLLM allocates them."""

import dataclasses
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.cache import EngineCache, open_cache
from kvserve_connector.chunks import check_form, plan_form
from kvserve_connector.coding import ChunkCoder, raw_pipeline
from kvserve_connector.engine import Engine, inspect
from kvserve_strategies import PRESETS, Pipeline

pytestmark = pytest.mark.slow  # importing vLLM takes its time

BLOCKS = 12
BLOCK = 32
STRATEGIES = {"raw": raw_pipeline(), "lossless": Pipeline.of(PRESETS["lossless"])}
STRATEGY = pytest.mark.parametrize("pipeline", STRATEGIES.values(), ids=STRATEGIES)


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Import vLLM, whose own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.worker.utils  # noqa: F401


class Model:
    """An engine of a kind, with its cache as vLLM makes it.

    Args:
        specs: One of vLLM's specifications for each group.
        layout: vLLM's name of the memory order.
        seed: Of the cache's content; zeros without.
        isa: What the attention layers say of their instruction set.
    """

    def __init__(
        self, specs: Sequence[Any], layout: str = "LBNHC", *, seed: int | None = None, isa: str = ""
    ) -> None:
        from vllm.v1.kv_cache_interface import (
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
            iter_layer_specs,
        )
        from vllm.v1.kv_cache_layout import KVCacheLayout
        from vllm.v1.worker.utils import allocate_kv_cache

        groups = [
            KVCacheGroupSpec([f"model.layers.{2 * at + n}.attn" for n in range(2)], each)
            for at, each in enumerate(specs)
        ]
        # groups overlay each other: a block belongs to one of them at a time
        page = max(s.page_size_bytes for each in specs for s in iter_layer_specs(each))
        tensors = [
            KVCacheTensor(
                size=2 * page * BLOCKS,
                layers=group.layer_names,
                layer_stride=page * BLOCKS,
                block_stride=page,
            )
            for group in groups
        ]
        config = KVCacheConfig(BLOCKS, tensors, groups)
        self.caches = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout[layout])
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            memory = next(iter(self.caches.values())).untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(memory)
            whole.copy_(torch.randint(0, 256, whole.shape, generator=generator, dtype=torch.uint8))
        parallel = dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), 1)
        self.engine: Engine = inspect(
            SimpleNamespace(
                parallel_config=SimpleNamespace(**parallel),
                model_config=SimpleNamespace(hf_config=SimpleNamespace(to_dict=dict)),
                kv_transfer_config=SimpleNamespace(engine_id="e-1"),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
            ),
            config,
        )
        layer = SimpleNamespace(
            get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "SOME"), isa=isa
        )
        self.cache: EngineCache = open_cache(
            self.engine, self.caches, dict.fromkeys(self.caches, layer)
        )

    def block(self, layer: int, block: int) -> torch.Tensor:
        """Return a copy of a block's bytes."""
        content = self.caches[f"model.layers.{layer}.attn"][block]
        copied: torch.Tensor = content.contiguous().flatten().view(torch.uint8).clone()
        return copied


def attention(kind: str = "FullAttentionSpec", **changes: Any) -> Any:
    """Return one of vLLM's specifications of attention."""
    from vllm.v1 import kv_cache_interface

    values = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 16, "dtype": torch.bfloat16}
    return getattr(kv_cache_interface, kind)(**(values | changes))


def recurrent() -> Any:
    """Return the specification of a recurrent layer whose state is of two dtypes and an odd size."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(
        block_size=1024, shapes=((3, 65), (5, 7)), dtypes=(torch.bfloat16, torch.float32)
    )


def fp8() -> Any:
    """Return the specification of attention with a cache of 8-bit floats."""
    from vllm.v1.kv_cache_interface import KVQuantMode

    return attention(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)


MODELS = {
    "mla": lambda: [attention("MLAAttentionSpec", num_kv_heads=1, head_size=72)],
    "fp8": lambda: [fp8()],
    "packed": lambda: [attention(state_content_bytes=33, dtype=torch.uint8)],
    "uneven": lambda: [attention(head_size_v=8)],
    "hybrid": lambda: [
        attention(),
        attention("SlidingWindowSpec", sliding_window=40),
        attention("ChunkedLocalAttentionSpec", attention_chunk_size=64),
        recurrent(),
    ],
}
MODEL = pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS)


def carry(source: Model, target: Model, pipeline: Pipeline, tokens: range, ids: Any) -> int:
    """Send what these tokens need from one cache to the other; return the bytes of the blobs."""
    nbytes = 0
    chunks = plan_form(source.cache.form, tokens, 5)
    check_form(chunks, target.cache.form, tokens)
    out, into = (ChunkCoder(model.cache.form, lambda _: None) for model in (source, target))
    for chunk in chunks:
        blob = out.encode(pipeline, chunk, *source.cache.read(chunk, ids[0]))
        nbytes += len(blob)
        target.cache.write(chunk, ids[1], *into.decode(bytearray(blob), chunk))
    return nbytes


@STRATEGY
@MODEL
def test_blocks_arrive_byte_by_byte(specs: Any, pipeline: Pipeline) -> None:
    """What the next token needs is in the target's blocks, exactly, and no other block was touched."""
    source, target = Model(specs(), seed=3), Model(specs())
    tokens = 3 * BLOCK - 5
    lists = ([3, 9, 5], [1, 2, 4])
    groups = source.engine.groups
    # another group's blocks are others: here the list is shifted for each
    ids = [
        [
            group.held([1 + (i + at) % (BLOCKS - 1) for i in own], tokens)
            for at, group in enumerate(groups)
        ]
        for own in lists
    ]
    carry(source, target, pipeline, range(tokens), ids)
    # a window of 40 tokens before token 91 begins in the second block, a chunk of 64 in the third
    wanted = {"all": (0, 1, 2), "window": (1, 2), "chunk": (2,), "state": (0,)}
    written = set()
    for at, group in enumerate(groups):
        for index in wanted[group.reach]:
            for name in group.layer_names:
                layer = int(name.split(".")[2])
                theirs = source.block(layer, ids[0][at][index])
                assert torch.equal(target.block(layer, ids[1][at][index]), theirs), (name, index)
            written.add(ids[1][at][index])
    untouched = set(range(BLOCKS)) - written
    assert not any(target.block(layer, b).any() for layer in range(2) for b in untouched)


@STRATEGY
def test_every_memory_order(pipeline: Pipeline) -> None:
    """Both ends may keep one cache in different orders of memory, as long as a block means the same."""
    specs = [attention("SlidingWindowSpec", sliding_window=1000)]
    source = Model(specs, "LBNHC", seed=3)
    target = Model(specs, "LBHNC")
    assert source.cache.form == target.cache.form
    carry(source, target, pipeline, range(70), [[(3, 9, 5)], [(1, 2, 4)]])
    assert torch.equal(target.block(1, 4), source.block(1, 5))


def test_numbers_shrink_without_loss() -> None:
    """Latents of a usual spread get smaller by the lossless strategy, though their blocks are opaque."""
    specs = MODELS["mla"]()
    source, target = Model(specs, seed=1), Model(specs)
    for cache in source.caches.values():
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(5)))
    ids = [[tuple(range(1, 11))], [tuple(range(1, 11))]]
    tokens = range(10 * BLOCK)
    nbytes = carry(source, target, STRATEGIES["lossless"], tokens, ids)
    assert source.cache.form.native_bytes(tokens) / nbytes > 1.3
    assert torch.equal(target.block(1, 10), source.block(1, 10))


@pytest.mark.parametrize(
    ("held", "text"),
    [
        pytest.param((0, 9, 5), "does not hold blocks 0", id="forgotten"),
        pytest.param((3, 9), "does not hold blocks", id="too-few"),
    ],
)
def test_blocks_that_are_gone_are_refused(held: tuple[int, ...], text: str) -> None:
    """A block that the engine has given away is never read in its place, nor written to."""
    model = Model(MODELS["mla"]())
    (first, *_) = plan_form(model.cache.form, range(3 * BLOCK), 5)
    for use in (
        lambda: model.cache.read(first, [held]),
        lambda: model.cache.write(first, [held], *model.cache.read(first, [(1, 2, 3)])),
    ):
        with pytest.raises(WireError, match=text) as caught:
            use()
        assert caught.value.reason == WireReason.RANGE_MISMATCH


def test_blocks_mean_the_same_or_are_not_carried() -> None:
    """Another instruction set, dtype, block size or window is another meaning; another engine run is none."""
    base = Model(MODELS["fp8"](), isa="amx").cache.form
    assert Model(MODELS["fp8"](), isa="amx").cache.form == base
    others = [
        Model(MODELS["fp8"](), isa="vec"),
        Model([dataclasses.replace(fp8(), block_size=64)], isa="amx"),
        Model([dataclasses.replace(fp8(), head_size_v=16, dtype=torch.int8)], isa="amx"),
    ]
    assert len({base.blocks, *(model.cache.form.blocks for model in others)}) == 4


@pytest.mark.parametrize(
    ("specs", "carried"),
    [
        pytest.param(MODELS["mla"], {"none", "lossless"}, id="numbers"),
        pytest.param(MODELS["fp8"], {"none"}, id="bytes"),
        pytest.param(MODELS["hybrid"], {"none", "lossless"}, id="both"),
    ],
)
def test_nothing_lossy_is_offered(specs: Any, carried: set[str]) -> None:
    """Of all presets only those that lose nothing may code an opaque cache, and of bytes only the raw one."""
    form = Model(specs()).cache.form
    found = {name for name, config in PRESETS.items() if form.carries(Pipeline.of(config))}
    assert found & {"none", "lossless", "fp8", "int8-token", "joint-3"} == carried
    assert all(Pipeline.of(PRESETS[name]).lossless for name in found)


def test_parts_are_not_mixed_up() -> None:
    """A blob of one part is refused in the place of another with the same layout."""
    model = Model([attention(), attention("SlidingWindowSpec", sliding_window=1000)], seed=1)
    coder = ChunkCoder(model.cache.form, lambda _: None)
    first, second = plan_form(model.cache.form, range(BLOCK), 5)
    blob = coder.encode(raw_pipeline(), first, *model.cache.read(first, [(1,), (2,)]))
    with pytest.raises(WireError) as caught:
        coder.decode(bytearray(blob), second)
    assert caught.value.reason == WireReason.MODEL_MISMATCH
