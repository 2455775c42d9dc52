"""Which engines can be served, and how the others are told."""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_connector.cache import open_cache
from kvserve_connector.chunks import Chunk
from kvserve_connector.engine import Engine, inspect
from kvserve_connector.groups import Opaque, Reach

pytestmark = pytest.mark.slow  # importing vLLM takes its time

LAYERS = tuple(f"model.layers.{index}.self_attn.attn" for index in (0, 1, 2, 10, 11))
MODEL = {"model_type": "llama", "num_hidden_layers": 12, "vocab_size": 512}


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Import vLLM, whose own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.kv_cache_interface  # noqa: F401


def spec(kind: str = "FullAttentionSpec", **changes: Any) -> Any:
    """Return one of vLLM's cache specifications."""
    from vllm.v1 import kv_cache_interface

    values = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    if isinstance(mode := changes.get("kv_quant_mode"), int):
        changes["kv_quant_mode"] = kv_cache_interface.KVQuantMode(mode)
    return getattr(kv_cache_interface, kind)(**(values | changes))


def look(*specs: Any, **parallel: int) -> Engine:
    """Inspect an engine with one cache group for each specification."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    # out of order, as a dictionary's order is nobody's promise
    names = [f"model.layers.{index}.self_attn.attn" for index in (11, 2, 0, 1, 10)]
    groups = [KVCacheGroupSpec(layer_names=names, kv_cache_spec=each) for each in specs]
    sizes = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: MODEL)),
        kv_transfer_config=SimpleNamespace(engine_id="e-1"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
    )
    cache_config = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
    return inspect(config, cache_config)


def test_facts_of_a_plain_engine() -> None:
    """Layers come in model order, and layout and fingerprint are those of the model."""
    engine = look(spec())
    assert engine.layout == KVLayout(layers=5, kv_heads=2, head_dim=64, dtype="bfloat16")
    (group,) = engine.groups
    assert group.layer_names == LAYERS
    assert (group.block_tokens, group.reach, engine.held_back) == (16, Reach.ALL, 0)
    assert (engine.opaque, engine.engine_id) == (None, "e-1")
    assert engine.fingerprint == model_fingerprint(MODEL)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        pytest.param({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1", id="pp"),
        pytest.param({"decode_context_parallel_size": 2}, "must be 1", id="dcp"),
    ],
)
def test_parallel_engines_are_refused(parallel: dict[str, int], text: str) -> None:
    """Every kind of model parallelism but tensor parallelism is refused by name."""
    with pytest.raises(UnsupportedError, match=text):
        look(spec(), **parallel)


def test_tensor_parallel_workers_are_counted() -> None:
    """The engine knows how many workers share its cache, and how many tokens a step has at most."""
    assert (look(spec()).ranks, look(spec(), tensor_parallel_size=2).ranks) == (1, 2)
    assert look(spec()).step_tokens == 512


WINDOW: dict[str, Any] = {
    "kind": "SlidingWindowSpec",
    "sliding_window": 100,
    "extra_retained_tokens": 4,
}
CHUNKS: dict[str, Any] = {"kind": "ChunkedLocalAttentionSpec", "attention_chunk_size": 64}


def state(**changes: Any) -> Any:
    """Return the specification of a recurrent layer."""
    from vllm.v1.kv_cache_interface import MambaSpec

    shapes, dtypes = ((3, 130), (2, 16, 8)), (torch.bfloat16, torch.float32)
    return MambaSpec(block_size=1024, shapes=shapes, dtypes=dtypes, **changes)


@pytest.mark.parametrize(
    ("changes", "opaque"),
    [
        pytest.param(
            {"kind": "MLAAttentionSpec", "num_kv_heads": 1, "head_size": 576}, Opaque.MLA, id="mla"
        ),
        pytest.param({"kv_quant_mode": 1, "dtype": torch.uint8}, Opaque.QUANTISED, id="fp8"),
        pytest.param({"state_content_bytes": 100}, Opaque.QUANTISED, id="packed"),
        pytest.param(WINDOW, Opaque.WINDOW, id="window"),
        pytest.param(CHUNKS, Opaque.WINDOW, id="chunks"),
        pytest.param({"head_size_v": 32}, Opaque.UNEVEN, id="uneven"),
        pytest.param({"dtype": torch.float8_e4m3fn}, Opaque.UNEVEN, id="dtype"),
        pytest.param({"num_head_slots": 1}, Opaque.UNEVEN, id="slots"),
    ],
)
def test_other_caches_are_opaque(changes: dict[str, Any], opaque: Opaque) -> None:
    """A cache that is not plain keys and values is carried whole, and why is known."""
    engine = look(spec(**changes))
    assert (engine.layout, engine.opaque, engine.unsupported) == (None, opaque, "")
    assert len(engine.groups) == 1


def test_groups_of_a_hybrid_model() -> None:
    """Each group knows how far back it looks, and only where something is forgotten a token is held back."""
    engine = look(spec(), spec(**WINDOW), state(num_speculative_blocks=2))
    assert engine.opaque == Opaque.STATE
    assert [(g.index, g.reach, g.span, g.spare_blocks) for g in engine.groups] == [
        (0, Reach.ALL, 0, 0),
        (1, Reach.WINDOW, 104, 0),
        (2, Reach.STATE, 0, 2),
    ]
    assert engine.held_back == 1
    both_full = look(spec(), spec())
    assert (both_full.opaque, both_full.held_back) == (Opaque.GROUPS, 0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"kind": "SinkFullAttentionSpec", "sink_len": 4}, id="sinks"),
        pytest.param({"kind": "CrossAttentionSpec"}, id="encoder"),
        pytest.param({"kind": "CircularBufferSpec"}, id="ring"),
    ],
)
def test_unknown_caches_are_no_error(changes: dict[str, Any]) -> None:
    """What keeps its blocks in a way that is not known is a fact, with the name of it, not an error."""
    engine = look(spec(), spec(**changes))
    assert engine.groups == ()
    assert changes["kind"] in engine.unsupported
    with pytest.raises(UnsupportedError, match=changes["kind"]):
        open_cache(engine, {}, {})


def attention(backend: str, **attributes: str) -> Any:
    """Return what the connector looks at in an attention layer."""
    return SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), **attributes
    )


def test_caches_open_by_backend() -> None:
    """A CPU cache and a GPU backend's cache of the same tensors are different, and both are opened."""
    engine = look(spec(block_size=32))
    caches = {name: torch.randn(4, 2, 32, 128).bfloat16() for name in reversed(LAYERS)}
    found = []
    for layer in (attention("CPU_ATTN", isa="vec"), attention("FLASH_ATTN")):
        cache = open_cache(engine, caches, dict.fromkeys(LAYERS, layer))
        assert cache.form.opaque is None
        keys, _ = cache.read(Chunk(layers=range(5), tokens=range(32)), [[3]])
        found.append(keys)
    assert not torch.equal(*found)
    first = caches[LAYERS[0]][3]
    assert torch.equal(found[1][0], first[..., :64].transpose(0, 1))
    transposed = first.reshape(2, 2, 32 * 64)[:, 0].view(2, 64, 32)
    assert torch.equal(found[0][0], transposed.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        pytest.param((4, 2, 32, 128), "FLEX_ATTENTION", id="backend"),
        pytest.param((8, 2, 16, 128), "FLASH_ATTN", id="kernel-blocks"),
        pytest.param((4, 2, 32, 2, 64), "FLASH_ATTN", id="five-dimensions"),
    ],
)
def test_unknown_forms_are_opaque(shape: tuple[int, ...], backend: str) -> None:
    """Keys and values that lie in an order that is not known are carried as whole blocks, not read."""
    engine = look(spec(block_size=32))
    caches = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in LAYERS}
    form = open_cache(engine, caches, dict.fromkeys(LAYERS, attention(backend))).form
    assert form.opaque == Opaque.BACKEND
    assert form.blocks
    # 40 tokens are two blocks of all five layers
    assert form.native_bytes(range(40)) == 2 * 5 * math.prod(shape) // 4 * 2


def test_half_a_block_is_no_block() -> None:
    """A cache that is not cut into the engine's blocks is refused, even as bytes."""
    engine = look(spec(block_size=32))
    caches = {name: torch.zeros((2, 4, 32, 128), dtype=torch.bfloat16) for name in LAYERS}
    with pytest.raises(UnsupportedError, match="not cut into 4 blocks"):
        open_cache(engine, caches, dict.fromkeys(LAYERS, attention("FLASH_ATTN")))
