"""What was stored behind a chunk: how a prompt that ends, or goes another way, inside the next one still finds it.

Whole chunks are found by their names alone. A chunk of which a prompt shares only the beginning has a name that the
prompt does not know; and the last part of a prompt is shorter than a chunk. So behind each chunk lies a short list of
what followed it, newest first, each by its marks (`kvserve_connector.stores.keys.Names`). The keys and values of a
token depend on nothing behind it, so the shared beginning of a longer chunk is as good as an own one.

Writers replace the list whole. When two do so at once one of them is forgotten, and is found no more until it is
written anew: a list is a help, never needed for what is right.
"""

import json
import re
from collections.abc import Sequence
from typing import Final, TypeAlias

MAX_CHILDREN: Final = 16
"""So many of the latest are kept."""
MAX_BYTES: Final = 1 << 18
_MARK: Final = re.compile(r"[0-9a-f]{32}")

Children: TypeAlias = tuple[tuple[str, ...], ...]
"""For each the marks from its start on; the last is its name."""


def parse(value: bytes | bytearray | None, chunk_marks: int) -> Children:
    """Read a list; one that is none counts as empty.

    Args:
        value: What the store has.
        chunk_marks: Marks of a whole chunk.
    """
    try:
        read = json.loads(value or b"[]")
    except ValueError:
        return ()
    if not isinstance(read, list):
        return ()
    return tuple(
        tuple(child)
        for child in read[:MAX_CHILDREN]
        if isinstance(child, list)
        and 1 <= len(child) <= chunk_marks
        and all(isinstance(mark, str) and _MARK.fullmatch(mark) for mark in child)
    )


def pack(children: Children) -> bytes:
    """Return a list as it is stored."""
    return json.dumps(children, separators=(",", ":")).encode()


def add(children: Children, child: tuple[str, ...]) -> Children:
    """Return the list with one more in front; what is the beginning of another is not needed beside it."""
    others = [other for other in children if other != child[: len(other)]]
    if any(child == other[: len(child)] for other in others):
        return children
    return (child, *others)[:MAX_CHILDREN]


def longest(children: Children, marks: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Return which child shares most with a prompt, and how many marks; ``((), 0)`` if none shares any.

    Args:
        children: What there is.
        marks: The prompt's, from the same place on.
    """
    best: tuple[tuple[str, ...], int] = ((), 0)
    for child in children:
        shared = next(
            (n for n, (a, b) in enumerate(zip(child, marks, strict=False)) if a != b),
            min(len(child), len(marks)),
        )
        if shared > best[1]:
            best = (child, shared)
    return best
