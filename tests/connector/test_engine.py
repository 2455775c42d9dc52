"""Which engines can be served, and how the others are told."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvserve_api.errors import UnsupportedError
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_connector.engine import Engine, inspect, open_cache

pytestmark = pytest.mark.slow  # importing vLLM takes its time

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
    )
    cache_config = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)
    return inspect(config, cache_config)


def test_facts_of_a_plain_engine() -> None:
    """Layers come in model order, and layout and fingerprint are those of the model."""
    engine = look(spec())
    assert engine.layout == KVLayout(layers=5, kv_heads=2, head_dim=64, dtype="bfloat16")
    assert [name.split(".")[2] for name in engine.layer_names] == ["0", "1", "2", "10", "11"]
    assert (engine.block_tokens, engine.engine_id) == (16, "e-1")
    assert engine.fingerprint == model_fingerprint(MODEL)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        pytest.param({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1", id="tp"),
        pytest.param({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1", id="pp"),
        pytest.param({"decode_context_parallel_size": 2}, "must be 1", id="dcp"),
    ],
)
def test_parallel_engines_are_refused(parallel: dict[str, int], text: str) -> None:
    """Every kind of model parallelism is refused by name."""
    with pytest.raises(UnsupportedError, match=text):
        look(spec(), **parallel)


def test_hybrid_models_are_refused() -> None:
    """A model with two cache groups is refused."""
    with pytest.raises(UnsupportedError, match="2 KV cache groups"):
        look(spec(), spec("SlidingWindowSpec", sliding_window=128))


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        pytest.param(
            "SlidingWindowSpec", {"sliding_window": 128}, "SlidingWindowSpec", id="window"
        ),
        pytest.param(
            "MLAAttentionSpec", {"num_kv_heads": 1, "head_size": 576}, "MLAAttentionSpec", id="mla"
        ),
        pytest.param("FullAttentionSpec", {"head_size_v": 32}, "same size", id="uneven"),
        pytest.param("FullAttentionSpec", {"dtype": torch.float8_e4m3fn}, "dtype", id="fp8"),
        pytest.param("FullAttentionSpec", {"state_content_bytes": 100}, "quantised", id="packed"),
        pytest.param("FullAttentionSpec", {"num_head_slots": 1}, "one slot", id="slots"),
    ],
)
def test_other_caches_are_refused(kind: str, changes: dict[str, Any], text: str) -> None:
    """A cache of another kind is refused with its name."""
    with pytest.raises(UnsupportedError, match=text):
        look(spec(kind, **changes))


def attention(backend: str, **attributes: str) -> Any:
    """Return what the connector looks at in an attention layer."""
    return SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), **attributes
    )


def test_caches_open_by_backend() -> None:
    """A CPU cache and a GPU backend's cache of the same tensors are different, and both are opened."""
    engine = look(spec(block_size=32))
    caches = {name: torch.randn(4, 2, 32, 128).bfloat16() for name in reversed(engine.layer_names)}
    found = []
    for layer in (attention("CPU_ATTN", isa="vec"), attention("FLASH_ATTN")):
        cache = open_cache(engine, caches, dict.fromkeys(engine.layer_names, layer))
        keys, _ = cache.read(range(5), range(32), [3])
        found.append(keys)
    assert not torch.equal(*found)
    first = caches[engine.layer_names[0]][3]
    assert torch.equal(found[1][0], first[..., :64].transpose(0, 1))
    transposed = first.reshape(2, 2, 32 * 64)[:, 0].view(2, 64, 32)
    assert torch.equal(found[0][0], transposed.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "backend", "text"),
    [
        pytest.param((4, 2, 32, 128), "FLEX_ATTENTION", "FLEX_ATTENTION", id="backend"),
        pytest.param((2, 4, 32, 2, 64), "FLASH_ATTN", "has a cache of form", id="old-form"),
        pytest.param((4, 2, 16, 128), "FLASH_ATTN", "has a cache of form", id="kernel-blocks"),
    ],
)
def test_unknown_forms_are_refused(shape: tuple[int, ...], backend: str, text: str) -> None:
    """A cache of another form or an unknown backend is refused, not read."""
    engine = look(spec(block_size=32))
    caches = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in engine.layer_names}
    layers = dict.fromkeys(engine.layer_names, attention(backend))
    with pytest.raises(UnsupportedError, match=text):
        open_cache(engine, caches, layers)
