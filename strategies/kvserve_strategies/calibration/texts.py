"""What a model reads while it is calibrated: given files, or what every Python brings along.

The built-in text is reference documentation, source code and package descriptions. It is a stopgap: a bundle fits best
what is like the text it was made with, so text of the requests to come is better.
"""

import importlib.metadata
import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from kvserve_api.canonical import digest, digest_bytes
from kvserve_api.errors import SpecError

MAX_BYTES: Final = 64 * 1024 * 1024
_PASSAGE_CHARACTERS: Final = 6
"""For each token of a window; a token has about four characters."""
_MODULES: Final = (
    "argparse", "bisect", "calendar", "configparser", "csv", "dataclasses", "difflib", "doctest", "enum",
    "fractions", "ftplib", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "nntplib", "optparse",
    "pathlib", "pdb", "pickletools", "plistlib", "pprint", "pydoc", "queue", "random", "sched", "selectors",
    "shlex", "shutil", "smtplib", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "traceback", "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
"""Modules of the standard library, in Python, with much commentary; one that a Python lacks is left out."""
_PACKAGES: Final = ("click", "numpy", "rich", "tokenizers", "torch", "transformers")
"""Installed with ``kvserve[calibrate]``; their descriptions are prose in Markdown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text to calibrate on.

    Attributes:
        digest: Of the file's bytes, or of the documents.
        documents: Pieces that have nothing to do with each other; no window spans two of them.
    """

    digest: str
    documents: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of UTF-8 text.

        Raises:
            SpecError: It can't be read, is too large, or is not text.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise SpecError("--text", f"can't read {path}: {error.strerror}") from error
        if len(data) > MAX_BYTES:
            raise SpecError("--text", f"{path} has more than {MAX_BYTES} bytes: use an excerpt")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise SpecError("--text", f"{path} is not UTF-8 text: {error.reason}") from error
        if "\0" in text:
            raise SpecError("--text", f"{path} is not text: it holds zero bytes")
        return cls(digest=digest_bytes(data), documents=(text,))

    @classmethod
    def of(cls, documents: Sequence[str]) -> Self:
        """Return text that is in no file."""
        return cls(digest=digest(list(documents)), documents=tuple(documents))


def builtin_texts() -> tuple[Text, ...]:
    """Return the built-in text: documentation of the language, source code, descriptions of packages.

    The same Python and packages give the same text; others give a little another, which the digests tell.
    """
    texts = (Text.of(_topics()), Text.of(_sources()), Text.of(_descriptions()))
    return tuple(text for text in texts if text.documents)


def choose_windows(
    texts: Sequence[Text],
    tokenise: Callable[[str], Sequence[int]],
    *,
    window_tokens: int,
    count: int,
    lead: Sequence[int] = (),
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Choose windows that don't overlap: in turn from each text, at random places.

    Args:
        texts: What to choose from.
        tokenise: Returns the token ids of a string. No more of a long text is read than is needed.
        window_tokens: Tokens of a window, ``lead`` included.
        count: How many windows; fewer if there is not more text.
        lead: Tokens that the model expects at the beginning of any text.
        seed: Of the choice.

    Returns:
        The windows, any number of the first of them from all texts alike.

    Raises:
        SpecError: No document is as long as a window.
    """
    size, longest = window_tokens - len(lead), 0
    chooser = random.Random(seed)

    def stretches(text: Text) -> Iterator[tuple[int, ...]]:
        nonlocal longest
        passages = [p for document in text.documents for p in _passages(document, size)]
        chooser.shuffle(passages)
        for passage in passages:
            tokens = tokenise(passage)
            longest = max(longest, len(tokens))
            for start in range(0, len(tokens) - size + 1, size):
                yield (*lead, *tokens[start : start + size])

    windows: list[tuple[int, ...]] = []
    sources = [stretches(text) for text in texts]
    while sources and len(windows) < count:
        for source in list(sources):
            if (window := next(source, None)) is None:
                sources.remove(source)
            else:
                windows.append(window)
    if not windows:
        raise SpecError(
            "--text", f"has {longest} tokens, one window needs {size}: give longer texts"
        )
    return tuple(windows[:count])


def _passages(document: str, window_tokens: int) -> list[str]:
    """Cut a document into about equal parts, each long enough for a window or two."""
    parts = max(1, len(document) // (_PASSAGE_CHARACTERS * window_tokens))
    cuts = [len(document) * part // parts for part in range(parts + 1)]
    return [document[a:b] for a, b in itertools.pairwise(cuts)]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        return []
    return ["\n".join(topics[name] for name in sorted(topics))]


def _sources() -> list[str]:
    sources = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        read = getattr(spec and spec.loader, "get_source", None)
        if read and (source := read(name)):
            sources.append(source)
    return sources


def _descriptions() -> list[str]:
    texts = []
    for name in _PACKAGES:
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        payload = metadata.get_payload()  # type: ignore[attr-defined]
        texts.append(payload if isinstance(payload, str) else "")
    # each is short: joined, windows span them, as a reader of several documents does
    text = "\n\n".join(text for text in texts if text)
    return [text] if text else []
