"""A tiny LLaMA with random weights, in a folder as a real model is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from kvserve_api.run import ClassInputs, RunInputs
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.model import Source
from kvserve_profiler.settings import Settings
from kvserve_profiler.task import Task
from kvserve_profiler.texts import Text
from kvserve_strategies.presets import PRESETS

PRESET_NAMES = ("none", "fp8", "int8-token", "int4-token")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with one token for each byte."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


@pytest.fixture(scope="session")
def space() -> tuple[Candidate, ...]:
    """A few fast presets."""
    return tuple(Candidate(name=name, strategy=PRESETS[name]) for name in PRESET_NAMES)


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Settings for windows of a few tokens."""
    return Settings(
        prefix_tokens=48,
        continuation_tokens=16,
        max_windows=3,
        block_tokens=4,
        resamples=200,
        cost_repeats=1,
    )


@pytest.fixture(scope="session")
def make_task(
    model_folder: Path, space: tuple[Candidate, ...], settings: Settings
) -> Callable[..., Task]:
    """Return a function that makes a task on the tiny model; every argument changes one thing."""

    def make(
        *,
        budget_bp: int = 100,
        max_trials: int = 64,
        space: tuple[Candidate, ...] = space,
        settings: Settings = settings,
    ) -> Task:
        inputs = RunInputs(
            policy="default/chat",
            model="tiny",
            revision="",
            model_source="",
            classes={"default": ClassInputs(max_loss_bp=budget_bp)},
            max_trials=max_trials,
        )
        source = Source(location=str(model_folder))
        return Task.of(inputs, source, {"default": Text.builtin()}, space, settings)

    return make
