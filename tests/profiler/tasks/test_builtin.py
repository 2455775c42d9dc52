"""Built-in tasks are the same for the same seed, and can be solved from what they say."""

import re

import pytest

from kvserve_api.errors import SpecError
from kvserve_profiler.tasks.builtin import NAMES, task_set
from kvserve_profiler.tasks.items import ExactMatch, LastWord


@pytest.mark.parametrize("name", NAMES)
def test_reproducible(name: str) -> None:
    """A seed decides everything; another gives other items."""
    assert task_set(name, seed=3, items=5) == task_set(name, seed=3, items=5)
    assert task_set(name, seed=3, items=5).digest != task_set(name, seed=4, items=5).digest


def test_a_fact_is_there_once() -> None:
    """What is asked for stands once in the text, before other text, and is asked for at the end."""
    for item in task_set("retrieval", items=20).items:
        assert isinstance(item, ExactMatch)
        text, _, question = item.prompt.rpartition("\n\n")
        stated = re.findall(rf"{question} (\d+)\.", text)
        assert stated == [item.answer]
        assert text.count("The code of the ") == 6


def test_last_words_are_words() -> None:
    """The answer is one word of letters, which ends a sentence."""
    items = task_set("last-word", items=20).items
    assert len(items) == 20
    for item in items:
        assert isinstance(item, LastWord)
        assert item.answer[0] == " "
        assert item.answer[1:].isalpha()


def test_unknown() -> None:
    """An unknown name is answered with those there are."""
    with pytest.raises(SpecError, match="there are last-word, retrieval"):
        task_set("sums")
