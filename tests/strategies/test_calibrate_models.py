"""Models under calibration: any architecture's cache, queries and rotations, found without knowing its name."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.wire import KVLayout, model_fingerprint
from kvserve_strategies.bundle import Rope
from kvserve_strategies.calibration.models import TransformersModel, check_cache
from kvserve_strategies.calibration.ropes import explain, turn
from tiny_models import config, save_model

TOKENS = [(7 * i * i + 3 * i) % 256 for i in range(100)]


def frequencies(theta: float, rotary_dim: int) -> np.ndarray[Any, Any]:
    """Return the frequencies of the original RoPE, as transformers rounds them."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return (1.0 / theta**exponents).double().numpy()


PLAIN = Rope(frequencies(1e4, 16))
HALF = Rope(frequencies(1e4, 8), interleaved=True)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(params=[
    pytest.param((config("LlamaConfig"), [PLAIN] * 3), id="llama"),
    pytest.param((config("Qwen2Config"), [PLAIN] * 3), id="qwen2-bias"),
    pytest.param((config("Qwen3Config", head_dim=16), [PLAIN] * 3), id="qwen3-norms"),
    pytest.param((config("MistralConfig", sliding_window=32), [PLAIN] * 3), id="mistral-window"),
    pytest.param((config("Phi3Config"), [PLAIN] * 3), id="phi3-fused"),
    pytest.param((config("GlmConfig", head_dim=16), [HALF] * 3), id="glm-interleaved-half"),
    pytest.param((config("Gemma2Config", head_dim=16, sliding_window=32), [PLAIN] * 3), id="gemma2-softcap"),
    pytest.param(
        (
            config("Gemma3TextConfig", num_hidden_layers=6, head_dim=16, sliding_window=32),
            [PLAIN] * 5 + [Rope(frequencies(1e6, 16))],
        ),
        id="gemma3-local-global",
    ),
    pytest.param(
        (config("SmolLM3Config", num_hidden_layers=4), [Rope(frequencies(2e6, 16))] * 3 + [None]), id="smollm3-nope"
    ),
    pytest.param((config("GPT2Config", n_embd=64, n_layer=3, n_head=4), [None] * 3), id="gpt2-no-rope"),
])  # fmt: skip
def architecture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Rope | None]]:
    """A model's folder, and how its layers rotate."""
    made, ropes = request.param
    return save_model(tmp_path / "model", made), ropes


def test_any_architecture_is_read_as_it_is(
    architecture: tuple[Path, list[Rope | None]],
) -> None:
    """Cache and continuation give what one pass gives, also beyond a sliding window; rotations are found."""
    folder, ropes = architecture
    model = TransformersModel(folder)
    assert [model.rope_of(layer) for layer in range(model.layers)] == ropes
    assert model.notes == ()
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(torch.tensor([TOKENS])).logits[0, 70:]
        cache = transformers.DynamicCache()
        whole(torch.tensor([TOKENS[:70]]), past_key_values=cache)
    keys, values = (
        torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers])
        for name in ("keys", "values")
    )
    keys.requires_grad_()
    values.requires_grad_()
    got = model.logits(TOKENS[70:], keys, values)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.autograd.backward(got.square().sum())
    for layer in range(model.layers):
        assert keys.grad is not None
        assert values.grad is not None
        assert keys.grad[layer].abs().max() > 0
        assert values.grad[layer].abs().max() > 0
    read = model.prefill(TOKENS[:70])
    assert read.keys.dtype == torch.bfloat16
    torch.testing.assert_close(read.keys, keys.detach().bfloat16(), atol=1e-3, rtol=0.01)
    torch.testing.assert_close(read.values, values.detach().bfloat16(), atol=1e-3, rtol=0.01)


def test_queries_are_those_before_rotation(tmp_path: Path) -> None:
    """What the projection, and the norm after it, give."""
    folder = save_model(tmp_path / "model", config("Qwen3Config", head_dim=16))
    model = TransformersModel(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    normed: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(whole.model.layers):
        layer.self_attn.q_norm.register_forward_hook(
            lambda _module, _input, output, index=index: normed.update({index: output[0]})
        )
    with torch.no_grad():
        whole(torch.tensor([TOKENS]))
    for index, queries in enumerate(model.prefill(TOKENS).queries):
        torch.testing.assert_close(queries, normed[index], atol=1e-4, rtol=1e-4)


def test_scaled_rotations_are_found(tmp_path: Path) -> None:
    """Frequencies and factors of YaRN and of LLaMA 3 are the model's own."""
    factors = []
    for parameters in (YARN, LLAMA3):
        folder = save_model(
            tmp_path / str(parameters["rope_type"]),
            config("LlamaConfig", rope_parameters=parameters),
        )
        model = TransformersModel(folder)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
        embedding = whole.model.rotary_emb
        rope = model.rope_of(2)
        assert rope is not None
        np.testing.assert_array_equal(rope.inv_freq, embedding.inv_freq.double().numpy())
        assert rope.attention_factor == embedding.attention_scaling
        assert not np.array_equal(rope.inv_freq, frequencies(parameters["rope_theta"], 16))  # type: ignore[arg-type]
        factors.append(rope.attention_factor)
    assert factors == [pytest.approx(0.1 * math.log(4) + 1), 1.0]


@pytest.mark.parametrize(
    ("kind", "parameters", "note"),
    [
        ("LlamaConfig", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "dynamic RoPE"),
        ("Phi3Config", LONG, "LongRoPE has other factors"),
    ],
)
def test_rotations_that_depend_on_the_length_are_left_alone(
    tmp_path: Path, kind: str, parameters: dict[str, Any], note: str
) -> None:
    """Such keys are coded as they are, and people are told."""
    made = config(kind, rope_parameters=parameters)
    if kind == "Phi3Config":
        made.original_max_position_embeddings = 128
    model = TransformersModel(save_model(tmp_path / "model", made))
    assert [model.rope_of(layer) for layer in range(3)] == [None] * 3
    assert len(model.notes) == 1
    assert note in model.notes[0]


def test_a_long_rope_of_one_factor_is_a_rotation(tmp_path: Path) -> None:
    """It is the same for every length."""
    made = config("Phi3Config", rope_parameters=LONG | {"long_factor": [1.0] * 8})
    model = TransformersModel(save_model(tmp_path / "model", made))
    rope = model.rope_of(0)
    assert rope is not None
    np.testing.assert_array_equal(rope.inv_freq, frequencies(1e4, 16))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_turning_back_undoes_turning(interleaved: bool, rotary_dim: int) -> None:
    """For pairs of both kinds; pairs turn by position times frequency, the rest stays."""
    rope = Rope(frequencies(100.0, rotary_dim), interleaved=interleaved)
    heads = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = [0, 1, 5, 100, 7]
    turned = turn(heads, rope, positions, back=False)
    torch.testing.assert_close(turn(turned, rope, positions, back=True), heads)
    torch.testing.assert_close(turned[..., rotary_dim:], heads[..., rotary_dim:], atol=0, rtol=0)
    first = (0, 1) if interleaved else (0, rotary_dim // 2)
    pair = torch.complex(*(turned[1, 0, i] for i in first))
    before = torch.complex(*(heads[1, 0, i] for i in first))
    assert complex(pair / before) == pytest.approx(complex(np.exp(1j)), abs=1e-5)


def test_a_wrong_description_is_found_out() -> None:
    """Keys that move in another way than described are not explained."""
    keys = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)).expand(3, 2, 8)
    moved = turn(keys, Rope(frequencies(1e4, 8)), [0, 1, 9], back=False)
    wrong = [Rope(frequencies(1e4, 8), interleaved=True), Rope(frequencies(9e3, 8))]
    assert explain(moved, [0, 1, 9], wrong) == (None, False)
    assert explain(moved, [0, 1, 9], [*wrong, Rope(frequencies(1e4, 8))])[1]
    assert explain(keys, [0, 1, 9], wrong) == (None, True)


def test_what_a_model_is_comes_from_its_folder(tmp_path: Path) -> None:
    """Layout, fingerprint, tokens, and no token that begins texts."""
    folder = save_model(tmp_path / "model", config("LlamaConfig"))
    model = TransformersModel(folder)
    assert model.layout == KVLayout(layers=3, kv_heads=2, head_dim=16, dtype="bfloat16")
    assert model.fingerprint == model_fingerprint(json.loads((folder / "config.json").read_text()))
    assert model.lead == ()
    assert model.tokenise("ab") == [model.tokenise("a")[0], model.tokenise("b")[0]]


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        pytest.param(transformers.MambaConfig(num_hidden_layers=2), "no attention", id="mamba"),
        pytest.param(transformers.T5Config(), "two caches", id="encoder-decoder"),
        pytest.param(transformers.DeepseekV3Config(), "latent attention", id="mla"),
        pytest.param(transformers.Gemma3nTextConfig(), "some are shared", id="shared"),
        pytest.param(transformers.JambaConfig(), "Linear|Mamba|not every layer", id="hybrid"),
    ],
)
def test_models_without_a_plain_cache_are_unsupported(made: Any, problem: str) -> None:
    """The error says what the model has instead."""
    with pytest.raises(UnsupportedError, match=problem):
        check_cache(made)


def test_a_model_whose_queries_stay_hidden_is_unsupported(tmp_path: Path) -> None:
    """GPT-J calls no attention function of transformers."""
    made = transformers.GPTJConfig(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, dtype="bfloat16",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="its queries can't be read"):
        TransformersModel(save_model(tmp_path / "model", made))


@pytest.mark.parametrize(
    ("remove", "problem"),
    [("config.json", "not a model folder"), ("model.safetensors", "can't load")],
)
def test_a_folder_without_a_model_is_bad_input(tmp_path: Path, remove: str, problem: str) -> None:
    """What is missing is named; a pickled checkpoint is not read instead."""
    folder = save_model(tmp_path / "model", config("LlamaConfig"))
    shutil.move(folder / remove, folder / "pytorch_model.bin")
    with pytest.raises(SpecError, match=problem):
        TransformersModel(folder)
