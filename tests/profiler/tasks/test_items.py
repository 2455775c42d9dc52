"""Items are read from JSON lines, and a wrong line is named."""

import json

import pytest

from kvserve_api.errors import SpecError
from kvserve_profiler.tasks.items import ExactMatch, LastWord, MultipleChoice, TaskSet


def parse(*lines: object) -> TaskSet:
    """Read objects as lines."""
    return TaskSet.parse("\n".join(json.dumps(line) for line in lines).encode(), "file")


def test_three_kinds() -> None:
    """Each kind of line becomes its item; what follows a prompt begins with its space."""
    task = parse(
        {"task": "last-word", "text": "the cat sat on the mat "},
        {"task": "multiple-choice", "question": "2+2=", "choices": ["4", " 5"], "answer": 0},
        {"task": "exact-match", "prompt": "6*7=", "answer": "42", "stop": ["."], "max_tokens": 3},
    )
    assert task.items == (
        LastWord(prompt="the cat sat on the", answer=" mat"),
        MultipleChoice(prompt="2+2=", choices=(" 4", " 5"), answer=0),
        ExactMatch(prompt="6*7=", answer="42", stop=(".",), max_tokens=3),
    )


def test_empty_lines_are_skipped_and_counted() -> None:
    """An empty line is nothing, but errors still count it."""
    document = b'\n{"task": "last-word", "text": "a b"}\n\nnonsense\n'
    with pytest.raises(SpecError, match=r"^file line 4: is not JSON"):
        TaskSet.parse(document, "file")
    assert len(TaskSet.parse(document[:-10], "file").items) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"task": "riddle"}, "file line 1.task: must be one of last-word"),
        ({"task": "last-word", "text": "alone"}, "text: must have at least two words"),
        ({"task": "last-word", "text": "a b", "answer": "b"}, "answer"),
        ({"task": "multiple-choice", "question": "q", "choices": ["a"], "answer": 0}, "choices"),
        ({"task": "multiple-choice", "question": "q", "choices": "ab", "answer": 0}, "choices"),
        (
            {"task": "multiple-choice", "question": "q", "choices": ["a", "b"], "answer": 2},
            "answer",
        ),
        ({"task": "exact-match", "prompt": "p", "answer": ""}, "answer: must not be empty"),
        ({"task": "exact-match", "prompt": "p", "answer": "a", "stop": [""]}, "stop"),
        ({"task": "exact-match", "prompt": "p", "answer": "a", "max_tokens": 0}, "max_tokens"),
        ([], "must be an object"),
    ],
)
def test_wrong_lines_are_named(line: object, problem: str) -> None:
    """The error says which line and which field."""
    with pytest.raises(SpecError) as caught:
        parse(line)
    assert str(caught.value).startswith("file line 1")
    assert problem in str(caught.value)


def test_no_items() -> None:
    """A document without items is no task."""
    with pytest.raises(SpecError, match="must hold 1 to 10000 lines, has 0"):
        TaskSet.parse(b"\n \n", "file")
    with pytest.raises(SpecError, match="UTF-8"):
        TaskSet.parse(b"\xff", "file")
