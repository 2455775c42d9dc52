"""The model under test: its KV cache is exact, and what has no plain KV cache is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers

from kvserve_api.errors import SpecError, UnavailableError, UnsupportedError
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_profiler.identity import identify
from kvserve_profiler.model import Model, Source, check_plain_cache


def test_predictions_with_the_exact_cache_are_the_models_own(
    model_folder: Path, tmp_path: Path
) -> None:
    """Prefill, canonical form and back give what one pass over all tokens gives."""
    exact = tmp_path / "float32"
    shutil.copytree(model_folder, exact)
    config = json.loads((exact / "config.json").read_text())
    (exact / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    model = Model(Source(location=str(exact)))
    tokens = model.tokenise("What is read in two steps must be read as in one.")
    kv = model.prefill(tokens[:30])
    scored = model.log_probabilities(tokens[30:], kv)
    whole = transformers.AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(torch.tensor([tokens])).logits[0, 30:].log_softmax(-1)
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0.0)
    # the scoring must not have changed the cache: the next strategy is measured with it
    torch.testing.assert_close(model.log_probabilities(tokens[30:], kv), scored, atol=0, rtol=0)


def test_the_cache_has_the_dtype_it_is_served_in(model_folder: Path) -> None:
    """Though computed in float32, the cache of a bfloat16 model is bfloat16, in canonical form."""
    model = Model(Source(location=str(model_folder)))
    kv = model.prefill(range(30))
    assert model.layout == KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="bfloat16")
    assert kv.keys.shape == kv.values.shape == (2, 30, 2, 8)
    assert kv.keys.dtype == kv.values.dtype == torch.bfloat16
    assert kv.keys.is_contiguous()
    assert kv.values.is_contiguous()


def test_a_shorter_cache_is_a_copy(model_folder: Path) -> None:
    """The first tokens of a cache are what a shorter text gives, contiguous."""
    model = Model(Source(location=str(model_folder)))
    part = model.prefill(range(20)).first(5)
    assert part.tokens == 5
    assert part.values.is_contiguous()
    torch.testing.assert_close(part.keys, model.prefill(range(5)).keys, atol=0.02, rtol=0.02)


def test_identity_depends_on_form_and_weights(model_folder: Path, tmp_path: Path) -> None:
    """The fingerprint is that of config.json; other weights change the weights' digest only."""
    config = json.loads((model_folder / "config.json").read_text())
    identity = identify(Source(location=str(model_folder)))
    assert identity.fingerprint == model_fingerprint(config)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    changed = identify(Source(location=str(other)))
    assert changed.fingerprint == identity.fingerprint
    assert changed.weights != identity.weights


def llama(**changes: Any) -> transformers.LlamaConfig:
    """Return a small configuration."""
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **changes
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        pytest.param(transformers.MambaConfig(num_hidden_layers=2), "no attention", id="mamba"),
        pytest.param(transformers.T5Config(), "two caches", id="encoder-decoder"),
        pytest.param(transformers.DeepseekV3Config(), "latent attention", id="mla"),
        pytest.param(
            transformers.Gemma3TextConfig(num_hidden_layers=6), "DynamicSliding", id="sliding"
        ),
        pytest.param(transformers.MistralConfig(sliding_window=64), "Sliding", id="mistral-v0.1"),
        pytest.param(transformers.Gemma3nTextConfig(), "not every layer", id="shared"),
    ],
)
def test_models_without_a_plain_cache_are_unsupported(config: Any, problem: str) -> None:
    """The error says what the model has instead."""
    with pytest.raises(UnsupportedError, match=problem):
        check_plain_cache(config)


def test_a_plain_model_is_supported() -> None:
    """LLaMA, and Mistral without a window, pass."""
    check_plain_cache(llama())
    check_plain_cache(transformers.MistralConfig(sliding_window=None))


def test_an_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    """A model type that transformers does not know can't be profiled."""
    (tmp_path / "config.json").write_text('{"model_type": "not-a-model"}')
    with pytest.raises(UnsupportedError, match=r"can't read the model's config.json"):
        Source(location=str(tmp_path)).config()


@pytest.mark.parametrize(
    ("remove", "problem"),
    [("config.json", "not a model folder"), ("model.safetensors", "can't load")],
)
def test_a_folder_without_a_model_is_bad_input(
    model_folder: Path, tmp_path: Path, remove: str, problem: str
) -> None:
    """What is missing is named."""
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    (broken / remove).unlink()
    with pytest.raises(SpecError, match=problem):
        Model(Source(location=str(broken)))


def test_pickled_weights_are_not_loaded(model_folder: Path, tmp_path: Path) -> None:
    """A folder with a PyTorch checkpoint instead of safetensors is refused, not unpickled."""
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(SpecError, match="safetensors"):
        Model(Source(location=str(broken)))


def test_a_hub_that_does_not_answer_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network is not the policy's fault."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match="example/not-cached"):
        Source(location="example/not-cached").config()
