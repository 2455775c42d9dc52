#!/usr/bin/env python
"""Turn a GGUF file of a llama-architecture model into a folder that transformers and vLLM load.

Run as ``python gguf_llama.py FILE.gguf FOLDER``. Needs gguf, numpy, safetensors, tokenizers and torch; neither
transformers nor accelerate. Quantised weights are dequantised and rounded to bfloat16, so the model is a little worse
than the one the GGUF was made of: good for comparisons, not for quoting its scores.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN: Final = 3
"""GGUF's token type of special tokens like ``<|im_end|>``."""
MODULES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of the weights, and those of transformers."""


class ConversionError(Exception):
    """The file is no GGUF of the kind this converter understands."""


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str) -> Any:
        """Return a value as Python has it.

        Raises:
            ConversionError: The file has no such key.
        """
        if key not in self._fields:
            raise ConversionError(f"{key}: missing in the GGUF file")
        return self._fields[key].contents()

    def expect(self, key: str, value: str) -> None:
        """Refuse a file made for something else.

        Raises:
            ConversionError: The key has another value.
        """
        if (found := self.get(key)) != value:
            raise ConversionError(f"{key}: must be {value!r}, is {found!r}")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of GGUF's query and key projections.

    GGUF interleaves the two rotary halves of each head; transformers keeps them one after the other.

    Args:
        weight: ``[heads * head_dim, hidden]``.
        heads: Query heads for ``attn_q``, KV heads for ``attn_k``.
    """
    rows, *rest = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def state_dict(reader: GGUFReader, *, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Return the weights in bfloat16, by the names transformers gives them."""
    weights = {}
    for tensor in reader.tensors:
        *block, base, kind = tensor.name.split(".")
        if base not in MODULES or kind != "weight":
            raise ConversionError(f"{tensor.name}: not a weight of a plain llama model")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if base in ("attn_q", "attn_k"):
            weight = unpermute(weight, heads if base == "attn_q" else kv_heads)
        prefix = f"model.layers.{block[1]}." if block else ""
        # copied: unquantised tensors are views of the file, which torch can't take
        weights[f"{prefix}{MODULES[base]}.weight"] = torch.from_numpy(np.array(weight)).to(
            torch.bfloat16
        )
    return weights


def model_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Return the contents of ``config.json``."""
    get = metadata.get
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "head_dim": get("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "vocab_size": get("llama.vocab_size"),
        "max_position_embeddings": get("llama.context_length"),
        # stored as float32: 1e-05 reads as 9.999999747378752e-06
        "rms_norm_eps": float(str(np.float32(get("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": get("llama.rope.freq_base"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **token_ids(metadata),
    }


def token_ids(metadata: Metadata) -> dict[str, int]:
    """Return the ids of the tokens that begin, end and pad a text."""
    return {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def tokenizer(metadata: Metadata) -> Tokenizer:
    """Return the byte-level BPE tokenizer of SmolLM models, which cuts numbers into digits first.

    Raises:
        ConversionError: The file's tokenizer is of another kind.
    """
    metadata.expect("tokenizer.ggml.model", "gpt2")
    metadata.expect("tokenizer.ggml.pre", "smollm")
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges")]
    result = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    result.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type")
    result.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return result


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Return the contents of ``tokenizer_config.json``, with the chat template."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    special = {
        name: tokens[metadata.get(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": metadata.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def convert(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer into an existing, empty folder.

    Raises:
        ConversionError: The file is not a GGUF of a llama model with a SmolLM tokenizer.
    """
    try:
        reader = GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source}: not a readable GGUF file: {error}") from error
    metadata = Metadata(reader)
    metadata.expect("general.architecture", "llama")
    weights = state_dict(
        reader,
        heads=metadata.get("llama.attention.head_count"),
        kv_heads=metadata.get("llama.attention.head_count_kv"),
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(metadata).save(str(folder / "tokenizer.json"))
    documents = {
        "config.json": model_config(metadata, tied="lm_head.weight" not in weights),
        "generation_config.json": token_ids(metadata),
        "tokenizer_config.json": tokenizer_config(metadata),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    """Convert what the command line names."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 64
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        convert(source, folder)
    except (ConversionError, OSError) as error:
        print(f"gguf_llama: {error}", file=sys.stderr)
        return 64
    return 0


if __name__ == "__main__":
    sys.exit(main())
