"""Text to calibrate on: what every Python has, or files, cut into windows that anyone can choose again."""

from pathlib import Path

import pytest

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import SpecError
from kvserve_strategies.calibration.texts import Text, builtin_texts, choose_windows


def test_the_built_in_text_is_large_and_always_the_same() -> None:
    """Three kinds, of at least 32,000 tokens together at four characters a token; nobody wrote it for us."""
    texts = builtin_texts()
    assert [text.digest for text in texts] == [text.digest for text in builtin_texts()]
    assert len({text.digest for text in texts}) == 3
    sizes = [sum(map(len, text.documents)) for text in texts]
    assert sum(sizes) > 4 * 4 * 32_768
    assert min(sizes) > 20_000


def test_the_built_in_text_is_not_what_codecs_are_judged_by() -> None:
    """No line of the profiler's evaluation corpus is in it, but for lines that are in every text."""
    corpus = Path(__file__).parents[2] / "profiler" / "kvserve_profiler" / "corpus"
    lines = {
        line.strip()
        for path in corpus.glob("*.txt")
        for line in path.read_text().splitlines()
        if len(line.strip()) > 40
    }
    assert len(lines) > 80
    read = "\n".join(document for text in builtin_texts() for document in text.documents)
    assert [line for line in sorted(lines) if line in read] == []


def test_a_file_is_one_document(tmp_path: Path) -> None:
    """Its digest is that of its bytes."""
    path = tmp_path / "mine.txt"
    path.write_bytes("Grüße, 世界\n".encode())
    text = Text.read(path)
    assert text.documents == ("Grüße, 世界\n",)
    assert text.digest == digest_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"\xff\xfe\x00", "is not UTF-8 text", id="binary"),
        pytest.param(b"text\0text", "holds zero bytes", id="zeros"),
        pytest.param(None, "can't read", id="missing"),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes | None, problem: str) -> None:
    """The error names the file."""
    path = tmp_path / "mine.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SpecError, match=rf"{problem}|mine\.txt.*{problem}"):
        Text.read(path)


def alphabet(first: int, count: int) -> str:
    """Return so many characters, each one of its own."""
    return "".join(map(chr, range(first, first + count)))


def code_points(text: str) -> list[int]:
    """Return a token for each character."""
    return [ord(character) for character in text]


TEXTS = (
    Text.of([alphabet(1000, 100), alphabet(2000, 45)]),
    Text.of([alphabet(3000, 25)]),
)


def test_windows_do_not_overlap_and_span_no_two_documents() -> None:
    """Every window is a stretch of one document, after what begins any text."""
    windows = choose_windows(TEXTS, code_points, window_tokens=11, count=100, lead=(7,), seed=1)
    read = [token for window in windows for token in window[1:]]
    assert len(read) == len(set(read)) >= 140
    for window in windows:
        assert window == (7, *range(window[1], window[1] + 10))
        assert window[1] // 1000 == window[-1] // 1000


def test_windows_are_taken_from_each_text_in_turn() -> None:
    """So that the first few are of all texts; a text that is used up leaves the rest to the others."""
    windows = choose_windows(TEXTS, code_points, window_tokens=10, count=6, seed=1)
    assert [window[0] >= 3000 for window in windows] == [False, True, False, True, False, False]


def test_the_seed_chooses() -> None:
    """The same seed chooses the same windows, another seed others."""
    chosen = [
        choose_windows(TEXTS, code_points, window_tokens=10, count=3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_no_more_is_read_than_is_needed() -> None:
    """A few windows of a long text need only a few passages of it."""
    read: list[str] = []

    def reading(text: str) -> list[int]:
        read.append(text)
        return code_points(text)

    choose_windows([Text.of(["x" * 1_000_000])], reading, window_tokens=100, count=3, seed=0)
    assert sum(map(len, read)) < 2000


def test_text_may_be_too_short() -> None:
    """The error says how much a window needs."""
    with pytest.raises(SpecError, match="has 100 tokens, one window needs 200: give longer texts"):
        choose_windows(TEXTS, code_points, window_tokens=201, count=1, lead=(7,))
