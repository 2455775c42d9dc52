r"""What a task asks: items of three kinds, read from JSON lines.

Each line is one object with ``task`` and what its kind needs:

    {"task": "last-word", "text": "She opened the door with her key"}
    {"task": "multiple-choice", "question": "…", "choices": ["…", "…"], "answer": 1}
    {"task": "exact-match", "prompt": "…", "answer": "42", "stop": ["\n"], "max_tokens": 16}
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields

MAX_ITEMS: Final = 10_000
MAX_CHARACTERS: Final = 200_000
"""Of one prompt; more does not fit a model's positions anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWord:
    """Predict the last word of a text, given all before it (LAMBADA: Paperno et al. 2016).

    Attributes:
        prompt: The text without its last word and the space before that.
        answer: The last word, with the space before it.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoice:
    """Choose the most likely answer: the largest log-probability for each byte of the answer.

    Attributes:
        prompt: The question.
        choices: The answers as they would follow it, leading space included.
        answer: Index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactMatch:
    """Generate greedily, and compare what stands before the first stop with the answer, white space aside.

    Attributes:
        prompt: What is read.
        answer: What must come out.
        stop: Strings that end the answer.
        max_tokens: Most tokens to generate.
    """

    prompt: str
    answer: str
    stop: tuple[str, ...]
    max_tokens: int


Item: TypeAlias = LastWord | MultipleChoice | ExactMatch


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSet:
    """The items of one task.

    Attributes:
        digest: Of the document they come from.
        items: At least one.
    """

    digest: str
    items: tuple[Item, ...]

    @property
    def key(self) -> str:
        """What tells the items from others in a trial log."""
        return f"{self.digest}/{len(self.items)}"

    def first(self, items: int) -> "TaskSet":
        """Return the task with so many of its items at most."""
        return TaskSet(digest=self.digest, items=self.items[:items])

    @classmethod
    def parse(cls, document: bytes, field: str) -> "TaskSet":
        """Read JSON lines; empty lines are skipped.

        Args:
            document: UTF-8.
            field: What to name in errors; the line's number is added.

        Raises:
            SpecError: A line is no item, or there is none, or there are too many.
        """
        try:
            lines = document.decode().split("\n")
        except UnicodeDecodeError as error:
            raise SpecError(field, f"is not UTF-8 text: {error.reason}") from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not 1 <= len(numbered) <= MAX_ITEMS:
            raise SpecError(field, f"must hold 1 to {MAX_ITEMS} lines, has {len(numbered)}")
        items = tuple(_item(line, f"{field} line {number}") for number, line in numbered)
        return cls(digest=digest_bytes(document), items=items)


def _item(line: str, where: str) -> Item:
    try:
        fields = Fields(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise SpecError(where, f"is not JSON: {error}") from error
    kind = fields.string("task", choices=list(_READERS))
    item = _READERS[kind](fields)
    fields.done()
    return item


def last_word(text: str) -> LastWord | None:
    """Return the item of a text, or None if it has fewer than two words."""
    prompt, space, word = text.rstrip().rpartition(" ")
    return LastWord(prompt=prompt.rstrip(), answer=space + word) if prompt.strip() else None


def _last_word(fields: Fields) -> LastWord:
    item = last_word(_text(fields, "text"))
    if item is None:
        raise fields.fail("text", "must have at least two words")
    return item


def _multiple_choice(fields: Fields) -> MultipleChoice:
    choices = fields.raw("choices")
    if not (
        isinstance(choices, list)
        and 2 <= len(choices) <= 64
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise fields.fail("choices", "must be a list of 2 to 64 strings that are not empty")
    return MultipleChoice(
        prompt=_text(fields, "question"),
        choices=tuple(" " + choice.strip() for choice in choices),
        answer=fields.integer("answer", minimum=0, maximum=len(choices) - 1),
    )


def _exact_match(fields: Fields) -> ExactMatch:
    stop = fields.raw("stop", ["\n"])
    if not (
        isinstance(stop, list)
        and len(stop) <= 16
        and all(isinstance(text, str) and text for text in stop)
    ):
        raise fields.fail("stop", "must be a list of at most 16 strings that are not empty")
    return ExactMatch(
        prompt=_text(fields, "prompt"),
        answer=fields.string("answer", min_length=1),
        stop=tuple(stop),
        max_tokens=fields.integer("max_tokens", 32, minimum=1, maximum=4096),
    )


def _text(fields: Fields, key: str) -> str:
    return fields.string(key, min_length=1, max_length=MAX_CHARACTERS)


_READERS: Final[dict[str, Callable[[Fields], Item]]] = {
    "last-word": _last_word,
    "multiple-choice": _multiple_choice,
    "exact-match": _exact_match,
}
