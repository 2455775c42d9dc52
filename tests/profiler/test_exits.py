"""Exit codes and last words."""

from pathlib import Path

import pytest

from kvserve_api.errors import (
    ArtifactError,
    InfeasibleError,
    SpecError,
    UnavailableError,
    UnsupportedError,
)
from kvserve_api.names import ExitCode
from kvserve_profiler.exits import MAX_MESSAGE, exit_code, last_words, leave_message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("a", "b"), ExitCode.BAD_INPUT),
        (ArtifactError("a", "b"), ExitCode.BAD_INPUT),
        (InfeasibleError("x"), ExitCode.INFEASIBLE),
        (UnsupportedError("x"), ExitCode.UNSUPPORTED),
        (UnavailableError("x"), ExitCode.FAILED),
        (RuntimeError("x"), ExitCode.FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_error_has_its_code(error: Exception, code: ExitCode) -> None:
    """The class of an error decides the exit code."""
    assert exit_code(error) == code


def test_last_words_are_one_bounded_line() -> None:
    """Reason first, no line breaks, cut."""
    text = last_words(SpecError("field", "is\n  wrong " + "x" * 5000))
    assert text.startswith("InvalidSpec: field: is wrong xxx")
    assert "\n" not in text
    assert len(text) == MAX_MESSAGE


def test_a_termination_message_is_never_a_new_file(tmp_path: Path) -> None:
    """Outside a container nothing is written."""
    leave_message(tmp_path / "termination-log", "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "termination-log").touch()
    leave_message(tmp_path / "termination-log", "x")
    assert (tmp_path / "termination-log").read_text() == "x"
