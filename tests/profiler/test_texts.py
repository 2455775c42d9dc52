"""Evaluation texts: the right one for each class, checked."""

from pathlib import Path

import pytest

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import SpecError
from kvserve_api.run import ClassInputs, RunInputs
from kvserve_profiler import corpus
from kvserve_profiler.texts import MAX_BYTES, Text, of_inputs, unique


def inputs(**digests: str | None) -> RunInputs:
    """Return inputs with these text digests."""
    return RunInputs(
        policy="default/chat",
        model="m",
        revision="",
        model_source="",
        classes={n: ClassInputs(max_loss_bp=100, text_digest=d) for n, d in digests.items()},
        max_trials=4,
    )


def test_the_corpus_is_small_plain_and_of_four_kinds() -> None:
    """Four different texts, long enough for a window, at most 40 KB in all."""
    documents = corpus.documents()
    assert len(set(documents)) == 4
    assert all(len(document) > 5000 for document in documents)
    assert sum(len(document.encode()) for document in documents) <= 40_000
    assert all(document.isascii() for document in documents)


def test_each_class_gets_its_text(tmp_path: Path) -> None:
    """Named text comes from the class's file, the rest from the corpus, which is measured once."""
    (tmp_path / "summaries.txt").write_text("some text")
    wanted = inputs(default=None, code=None, summaries=digest_bytes(b"some text"))
    texts = of_inputs(wanted, tmp_path)
    assert texts["summaries"].documents == ("some text",)
    assert texts["default"] == texts["code"] == Text.builtin()
    assert len(unique(texts)) == 2


def test_a_text_edited_after_the_run_was_planned_is_refused(tmp_path: Path) -> None:
    """The digest must be the one in the inputs."""
    (tmp_path / "default.txt").write_text("new text")
    with pytest.raises(SpecError, match=r"classes.default.text_digest.*edited after"):
        of_inputs(inputs(default=digest_bytes(b"old text")), tmp_path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(None, "can't read", id="missing"),
        pytest.param(b"\xff\xfe\x00", "not UTF-8", id="binary"),
        pytest.param(b"a" * (MAX_BYTES + 1), "more than", id="large"),
    ],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, data: bytes | None, problem: str
) -> None:
    """Missing, binary and huge files are named errors."""
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    with pytest.raises(SpecError, match=problem):
        Text.read(tmp_path / "text", "--text default")
