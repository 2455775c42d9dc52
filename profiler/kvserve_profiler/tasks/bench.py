"""Answering a task with the exact KV cache once, and with a strategy's as often as there are strategies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvserve_api.quality import TaskScore
from kvserve_profiler.codec import Codec
from kvserve_profiler.model import KV, Model
from kvserve_profiler.tasks.items import Item, TaskSet
from kvserve_profiler.tasks.score import compare
from kvserve_profiler.tasks.scoring import is_right, prompt_tokens

KEPT_BYTES: Final = 1 << 30
"""Of exact KV caches, kept from one strategy to the next; what is more is computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An item with what does not depend on the strategy.

    Attributes:
        item: What is asked.
        prompt: The tokens of its prompt.
        kv: The exact KV cache of all of them but the last; None if it is computed again when needed.
        right: Whether the model answers rightly with it.
    """

    item: Item
    prompt: tuple[int, ...]
    kv: KV | None
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


def answer(model: Model, task: TaskSet, *, kept_bytes: int = KEPT_BYTES) -> list[Answered]:
    """Answer a task with the exact cache.

    Args:
        model: The model.
        task: What is asked.
        kept_bytes: Of KV caches that are kept.

    Raises:
        SpecError: A prompt is too short or too long for the model.
    """
    answered = []
    for item in task.items:
        prompt = prompt_tokens(model, item)
        kv = model.prefill(prompt[:-1])
        right = is_right(model, item, prompt, kv)
        kept_bytes -= model.layout.native_bytes(kv.tokens)
        kept = kv if kept_bytes >= 0 else None
        answered.append(Answered(item=item, prompt=prompt, kv=kept, right=right))
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
        kv = model.prefill(one.prompt[:-1]) if one.kv is None else one.kv
        blob = codec.encode(kv)
        native += model.layout.native_bytes(kv.tokens)
        wire += len(blob)
        decoded = codec.decode(blob, kv.tokens)
        right.append(is_right(model, one.item, one.prompt, decoded))
    score = compare([one.right for one in answered], right, confidence_percent=confidence_percent)
    return Outcome(score=score, ratio=native / wire)


class Examiner:
    """Answers tasks with one strategy after the other; keeps the exact answers of the latest task."""

    def __init__(self, model: Model, *, confidence_percent: float) -> None:
        """Keep what answers.

        Args:
            model: The model.
            confidence_percent: Level of the upper limits.
        """
        self._model = model
        self._confidence_percent = confidence_percent
        self._key = ""
        self._answered: list[Answered] = []

    def score(self, codec: Codec, task: TaskSet) -> TaskScore:
        """Answer a task with a strategy.

        Raises:
            SpecError: A prompt is too short or too long for the model.
            KVServeError: The strategy refuses a cache.
        """
        if task.key != self._key:
            self._key, self._answered = "", []
            self._answered = answer(self._model, task)
            self._key = task.key
        outcome = measure(
            self._model, codec, self._answered, confidence_percent=self._confidence_percent
        )
        return outcome.score
