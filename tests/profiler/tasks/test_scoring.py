"""Answers are judged as a real model gives them, from the cache of all of the prompt but its last token."""

import string
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kvserve_api.errors import SpecError
from kvserve_profiler.model import KV, Model, Source
from kvserve_profiler.tasks.items import ExactMatch, LastWord, MultipleChoice
from kvserve_profiler.tasks.scoring import is_right, prompt_tokens


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    """The tiny model: a token for each byte."""
    return Model(Source(location=str(model_folder)))


def whole(model: Model, text: str, tokens: int) -> list[int]:
    """Return what the model writes on, each token from the whole text anew."""
    written: list[int] = []
    for _ in range(tokens):
        kv = model.prefill([*model.tokenise(text), *written][:-1])
        last = [*model.tokenise(text), *written][-1:]
        written.append(int(model.log_probabilities(last, kv)[-1].argmax()))
    return written


class Fake:
    """A reader whose most likely successor of a letter is the next one of the alphabet."""

    def __init__(self) -> None:
        self.lead: tuple[int, ...] = ()
        self.max_positions: int | None = 64

    def tokenise(self, text: str) -> list[int]:
        """Return the bytes."""
        return list(text.encode())

    def log_probabilities(self, tokens: Sequence[int], past: KV) -> torch.Tensor:
        """Give the next letter nine tenths."""
        table = torch.full((len(tokens), 256), 0.1 / 255)
        for row, token in enumerate(tokens):
            table[row, token + 1] = 0.9
        return table.log()

    def generate(
        self, prompt: Sequence[int], past: KV, *, max_tokens: int, stop: Sequence[str]
    ) -> str:
        """Write the alphabet on."""
        start = prompt[-1] + 1
        return "".join(chr(start + step) for step in range(max_tokens))


NO_KV = KV(keys=torch.zeros(1, 1, 1, 1), values=torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("item", "right"),
    [
        (LastWord(prompt="xa", answer="bcd"), True),
        (LastWord(prompt="xa", answer="bcc"), False),
        (MultipleChoice(prompt="xa", choices=("cb", "bc"), answer=1), True),
        (MultipleChoice(prompt="xa", choices=("cb", "bc"), answer=0), False),
        # one likely byte has a better mean than three of which one is unlikely, though a worse end than none
        (MultipleChoice(prompt="xa", choices=("bcz", "b"), answer=1), True),
        (ExactMatch(prompt="xa", answer=" bc ", stop=("d",), max_tokens=5), True),
        (ExactMatch(prompt="xa", answer="bc", stop=("e",), max_tokens=5), False),
    ],
)
def test_judgement(item: LastWord | MultipleChoice | ExactMatch, right: bool) -> None:
    """Every token of a last word, the best mean of choices, the text before the stop."""
    reader = Fake()
    assert is_right(reader, item, prompt_tokens(reader, item), NO_KV) is right


def test_prompts_must_fit() -> None:
    """A prompt of one token has no cache to send, and one beyond the model's positions can't be read."""
    with pytest.raises(SpecError, match="less than two tokens"):
        prompt_tokens(Fake(), LastWord(prompt="a", answer="b"))
    with pytest.raises(SpecError, match="needs 65 tokens"):
        prompt_tokens(Fake(), ExactMatch(prompt="a" * 60, answer="b", stop=(), max_tokens=5))


def test_generation_goes_on_from_the_cache(model: Model, model_folder: Path) -> None:
    """What is generated from a cache is what the model writes when it reads everything anew."""
    prompt = model.tokenise("The quick brown fox")
    kv = model.prefill(prompt[:-1])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = tokenizer.decode(whole(model, "The quick brown fox", 6))
    assert model.generate(prompt, kv, max_tokens=6, stop=[]) == expected
    assert kv.tokens == len(prompt) - 1


def test_generation_stops(model: Model) -> None:
    """Writing ends with the stop string, or after so many tokens."""
    prompt = model.tokenise(string.ascii_lowercase)
    kv = model.prefill(prompt[:-1])
    long = model.generate(prompt, kv, max_tokens=12, stop=[])
    assert model.generate(prompt, kv, max_tokens=3, stop=[]) == long[:3]
    assert (
        model.generate(prompt, kv, max_tokens=12, stop=[long[4]]) == long[: long.index(long[4]) + 1]
    )
