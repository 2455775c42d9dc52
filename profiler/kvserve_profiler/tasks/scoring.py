"""Whether a model answers an item rightly, given the KV cache of the item's prompt.

As in serving, the KV cache is that of all tokens of the prompt but the last, which the decode side reads itself.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvserve_api.errors import SpecError
from kvserve_profiler.model import KV
from kvserve_profiler.tasks.items import ExactMatch, Item, LastWord, MultipleChoice


class Reader(Protocol):
    """What scoring needs of a model; see `kvserve_profiler.model.Model`."""

    lead: tuple[int, ...]
    max_positions: int | None

    def tokenise(self, text: str) -> list[int]:
        """Return the text's tokens."""
        ...

    def log_probabilities(self, tokens: Sequence[int], past: KV) -> torch.Tensor:
        """Return the prediction after each token."""
        ...

    def generate(
        self, prompt: Sequence[int], past: KV, *, max_tokens: int, stop: Sequence[str]
    ) -> str:
        """Return what the model writes on."""
        ...


def prompt_tokens(reader: Reader, item: Item) -> tuple[int, ...]:
    """Return the tokens of an item's prompt.

    Raises:
        SpecError: It has less than two tokens, or more than the model takes with its answer.
    """
    tokens = (*reader.lead, *reader.tokenise(item.prompt))
    if len(tokens) < 2:
        raise SpecError("prompt", f"{item.prompt!r} has less than two tokens")
    most = reader.max_positions
    needed = len(tokens) + _answer_tokens(reader, item)
    if most is not None and needed > most:
        raise SpecError(
            "prompt",
            f"{item.prompt[:40]!r}… needs {needed} tokens with its answer; the model takes {most}",
        )
    return tokens


def is_right(reader: Reader, item: Item, prompt: Sequence[int], past: KV) -> bool:
    """Tell whether the model answers rightly.

    Args:
        reader: The model.
        item: What is asked.
        prompt: What `prompt_tokens` returned.
        past: The KV cache of all of them but the last, exact or compressed.
    """
    match item:
        case LastWord():
            wanted = reader.tokenise(item.answer)
            predicted = reader.log_probabilities([prompt[-1], *wanted[:-1]], past).argmax(-1)
            return predicted.tolist() == wanted
        case MultipleChoice():
            scores = [_mean(reader, choice, prompt[-1], past) for choice in item.choices]
            return max(range(len(scores)), key=scores.__getitem__) == item.answer
        case ExactMatch():
            written = reader.generate(prompt, past, max_tokens=item.max_tokens, stop=item.stop)
            for stop in item.stop:
                written = written.partition(stop)[0]
            return " ".join(written.split()) == " ".join(item.answer.split())


def _mean(reader: Reader, choice: str, last: int, past: KV) -> float:
    """Return the log-probability of an answer for each of its bytes, so that long answers aren't at a loss."""
    tokens = reader.tokenise(choice)
    predicted = reader.log_probabilities([last, *tokens[:-1]], past)
    total = predicted[torch.arange(len(tokens)), torch.tensor(tokens)].sum(dtype=torch.float64)
    return float(total) / len(choice.encode())


def _answer_tokens(reader: Reader, item: Item) -> int:
    match item:
        case LastWord():
            return len(reader.tokenise(item.answer))
        case MultipleChoice():
            return max(len(reader.tokenise(choice)) for choice in item.choices)
        case ExactMatch():
            return item.max_tokens
