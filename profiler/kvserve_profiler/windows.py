"""Cutting evaluation text into windows: a prefix whose KV cache is compressed, and the tokens scored with it."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvserve_api.errors import SpecError
from kvserve_profiler.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Tokens of one stretch of text.

    Attributes:
        prefix: Token ids whose KV cache is transferred.
        continuation: The token ids that follow; each but the first is predicted by the one before it.
    """

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]


def cut(
    documents: Sequence[Sequence[int]], settings: Settings, *, lead: Sequence[int] = ()
) -> tuple[Window, ...]:
    """Choose windows that don't overlap, the same number from each document where they suffice, evenly spread.

    Args:
        documents: Token ids of each document.
        settings: How long windows are and how many are wanted.
        lead: Tokens the model expects at the beginning of any text; they count as part of the prefix.

    Raises:
        SpecError: No document is long enough.
    """
    size = settings.window_tokens - len(lead)
    # one turn takes one more window of each document, so that short documents don't starve long ones
    counts = [0] * len(documents)
    room = [len(tokens) // size for tokens in documents]
    while sum(counts) < settings.max_windows and counts != room:
        for index, available in enumerate(room):
            if counts[index] < available and sum(counts) < settings.max_windows:
                counts[index] += 1
    if not any(counts):
        longest = max((len(tokens) for tokens in documents), default=0)
        raise SpecError(
            "text", f"has {longest} tokens, but one window needs {size}: give a longer text"
        )
    return tuple(
        _window(tokens, start * size, settings, lead)
        for tokens, count, available in zip(documents, counts, room, strict=True)
        for start in _spread(count, available)
    )


def halves(
    tokens: Sequence[int], settings: Settings, *, lead: Sequence[int] = ()
) -> tuple[Sequence[int], Sequence[int]]:
    """Cut a document in two, so that no token is scored in both.

    A search takes what looks best on its windows, and so what was lucky there; what it found is measured again on
    others. A document of less than two windows gives two whose prefixes overlap, if the scored tokens need not.

    Args:
        tokens: Token ids of the document.
        settings: How long windows are.
        lead: See `cut`.

    Returns:
        What the search sees, and what is held out; the latter is empty if the document is too short.
    """
    size, scored = settings.window_tokens - len(lead), settings.continuation_tokens
    if len(tokens) >= 2 * size:
        middle = len(tokens) // 2
        return tokens[:middle], tokens[middle:]
    if len(tokens) >= size + scored:
        return tokens[:size], tokens[-size:]
    return tokens, ()


def _spread(count: int, available: int) -> list[int]:
    """Return ``count`` different indices of ``available``, evenly spread."""
    return [(2 * index + 1) * available // (2 * count) for index in range(count)]


def _window(tokens: Sequence[int], start: int, settings: Settings, lead: Sequence[int]) -> Window:
    middle = start + settings.prefix_tokens - len(lead)
    return Window(
        prefix=(*lead, *tokens[start:middle]),
        continuation=tuple(tokens[middle : middle + settings.continuation_tokens]),
    )
