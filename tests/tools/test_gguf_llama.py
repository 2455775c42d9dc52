"""The model converter: a GGUF becomes the very model it was made of."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

import gguf_llama

TEXT = "<|end|>In 1984 it cost 12 + 5."
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
NAMES = {after: before for before, after in gguf_llama.MODULES.items()}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the rotary halves of each head, as GGUF stores queries and keys."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def model() -> transformers.LlamaForCausalLM:
    """A random model whose weights bfloat16 can hold."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model.eval()


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, arch: str = "llama") -> None:
    """Write a model as a GGUF with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", *alphabet, "Ġi", "12", "19"])
    writer.add_token_types([gguf_llama.CONTROL_TOKEN] + [1] * 259)
    writer.add_token_merges(["Ġ i", "1 2", "1 9"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        module = name.removesuffix(".weight")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        base = NAMES[module]
        weight = tensor.numpy()
        if base in ("attn_q", "attn_k"):
            weight = permute(weight, 4 if base == "attn_q" else 2)
        writer.add_tensor(f"{prefix}{base}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_converted_model_is_the_original(
    model: transformers.LlamaForCausalLM, tmp_path: Path
) -> None:
    """Predictions are equal bit by bit: every weight is in its place, in its order."""
    write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "out").mkdir()
    gguf_llama.convert(tmp_path / "model.gguf", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=0, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6


def test_the_tokenizer_splits_digits_and_keeps_special_tokens(
    model: transformers.LlamaForCausalLM, tmp_path: Path
) -> None:
    """Numbers are cut into digits before merges apply, text comes back unchanged, the chat template is there."""
    write_gguf(tmp_path / "model.gguf", model)
    (tmp_path / "out").mkdir()
    gguf_llama.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer.tokenize(TEXT)
    assert tokens[0] == "<|end|>"
    assert tokens[4:8] == ["1", "9", "8", "4"]
    assert "12" not in tokens
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize("kind", ["other-architecture", "no-gguf", "missing"])
def test_other_files_are_refused(
    model: transformers.LlamaForCausalLM,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script says what is wrong with the file, and ends with 64."""
    path = tmp_path / "model.gguf"
    if kind == "other-architecture":
        write_gguf(path, model, arch="gemma")
    elif kind == "no-gguf":
        path.write_bytes(b"no model" * 100)
    monkeypatch.setattr(sys, "argv", ["gguf_llama.py", str(path), str(tmp_path / "out")])
    assert gguf_llama.main() == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gguf_llama: ")
    assert ("general.architecture" if kind == "other-architecture" else str(path)) in line
