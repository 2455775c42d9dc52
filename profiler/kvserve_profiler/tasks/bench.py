"""Answering a task with the exact KV cache once, and with a strategy's as often as there are strategies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserve_profiler.codec import Codec
from kvserve_profiler.model import KV, Model
from kvserve_profiler.tasks.items import Item, TaskSet
from kvserve_profiler.tasks.score import TaskScore, compare
from kvserve_profiler.tasks.scoring import is_right, prompt_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An item with what does not depend on the strategy.

    Attributes:
        item: What is asked.
        prompt: The tokens of its prompt.
        kv: The exact KV cache of all of them but the last.
        right: Whether the model answers rightly with it.
    """

    item: Item
    prompt: tuple[int, ...]
    kv: KV
    right: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a strategy does on a task.

    Attributes:
        score: The answers.
        ratio: Native bytes over bytes of the blobs of all prompts.
    """

    score: TaskScore
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as an object."""
        return {**self.score.to_json(), "loss_bp": self.score.loss_bp, "ratio": self.ratio}


def answer(model: Model, task: TaskSet) -> list[Answered]:
    """Answer a task with the exact cache.

    Raises:
        SpecError: A prompt is too short or too long for the model.
    """
    answered = []
    for item in task.items:
        prompt = prompt_tokens(model, item)
        kv = model.prefill(prompt[:-1])
        right = is_right(model, item, prompt, kv)
        answered.append(Answered(item=item, prompt=prompt, kv=kv, right=right))
    return answered


def measure(
    model: Model, codec: Codec, answered: Sequence[Answered], *, confidence_percent: float
) -> Outcome:
    """Answer the same items with the cache that comes out of a strategy.

    Raises:
        KVServeError: The strategy refuses a cache.
    """
    native = wire = 0
    right = []
    for one in answered:
        blob = codec.encode(one.kv)
        native += model.layout.native_bytes(one.kv.tokens)
        wire += len(blob)
        decoded = codec.decode(blob, one.kv.tokens)
        right.append(is_right(model, one.item, one.prompt, decoded))
    score = compare([one.right for one in answered], right, confidence_percent=confidence_percent)
    return Outcome(score=score, ratio=native / wire)
