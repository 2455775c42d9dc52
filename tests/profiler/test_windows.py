"""Windows: what of a text is measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import SpecError
from kvserve_profiler.settings import Settings
from kvserve_profiler.windows import cut, halves

SETTINGS = Settings(prefix_tokens=16, continuation_tokens=8, max_windows=4)


def test_one_window_of_each_document() -> None:
    """As many documents as windows give one window each, from the document's middle."""
    windows = cut(
        [range(30), range(100, 150)],
        Settings(prefix_tokens=16, continuation_tokens=8, max_windows=2),
    )
    assert windows[0].prefix == tuple(range(16))
    assert windows[0].continuation == tuple(range(16, 24))
    assert windows[1].prefix == tuple(range(124, 140))


def test_the_lead_is_part_of_each_prefix() -> None:
    """A beginning-of-text token comes first and takes a place of the prefix."""
    (window,) = cut([range(100, 130)], SETTINGS, lead=(1,))
    assert window.prefix == (1, *range(100, 115))
    assert window.continuation == tuple(range(115, 123))


def test_too_short_a_text_says_how_long_it_must_be() -> None:
    """A text without room for one window is an error that says what is needed."""
    with pytest.raises(SpecError, match="has 23 tokens, but one window needs 24"):
        cut([range(23), range(5)], SETTINGS)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(1, 9))
def test_windows_fit_and_do_not_overlap(lengths: list[int], wanted: int) -> None:
    """Whatever the documents: as many windows as asked for or as fit, whole, none overlapping."""
    starts = [1000 * index for index in range(len(lengths))]
    documents = [range(s, s + length) for s, length in zip(starts, lengths, strict=True)]
    room = sum(length // 24 for length in lengths)
    if room == 0:
        return
    windows = cut(documents, Settings(prefix_tokens=16, continuation_tokens=8, max_windows=wanted))
    assert len(windows) == min(wanted, room)
    tokens = [token for w in windows for token in (*w.prefix, *w.continuation)]
    assert len(set(tokens)) == len(tokens) == 24 * len(windows)
    for window in windows:
        whole = (*window.prefix, *window.continuation)
        assert whole == tuple(range(whole[0], whole[0] + 24))


@pytest.mark.parametrize("tokens", [1024, 1500, 1791, 1792, 5000])
def test_no_token_is_scored_in_a_search_and_after_it(tokens: int) -> None:
    """Whatever a document's length, the scored tokens of its two parts differ."""
    settings = Settings()
    seen, held = halves(range(tokens), settings)
    scored = [
        {token for window in cut([part], settings) for token in window.continuation}
        for part in (seen, held)
    ]
    assert all(scored)
    assert not scored[0] & scored[1]


def test_a_document_too_short_for_two_windows_is_all_seen() -> None:
    """It has nothing to hold out."""
    assert halves(range(1023), Settings()) == (range(1023), ())
