"""Random models whose caches are not plain keys and values, small enough for real servers in tests."""

from pathlib import Path

from vllm_servers import WORDS, write_tokenizer

COMMON = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    # large enough that the next word depends on the whole prompt
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}


def make_recurrent(folder: Path) -> Path:
    """Write an LFM2: two layers with a convolution's state, and one with attention between them."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(5)
    config = Lfm2Config(
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        # vLLM asks for what newer configurations have no more
        conv_dim=128,
        conv_dim_out=128,
        block_dim=128,
        block_ff_dim=256,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        **COMMON,
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_windowed(folder: Path) -> Path:
    """Write a Gemma 2: every second layer sees 100 tokens back."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(5)
    config = Gemma2Config(
        head_dim=64,
        sliding_window=100,
        query_pre_attn_scalar=64,
        **(COMMON | {"num_hidden_layers": 4}),
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder
