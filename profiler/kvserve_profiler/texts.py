"""The evaluation text of each workload class: the built-in corpus, or what a policy or the command line names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from kvserve_api.canonical import digest, digest_bytes
from kvserve_api.errors import SpecError
from kvserve_api.run import RunInputs
from kvserve_profiler import corpus

MAX_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Evaluation text.

    Attributes:
        digest: Of the file's bytes, or of the built-in corpus.
        documents: Texts that have nothing to do with each other; no window spans two of them.
    """

    digest: str
    documents: tuple[str, ...]

    @classmethod
    def builtin(cls) -> Self:
        """Return the built-in corpus."""
        documents = corpus.documents()
        return cls(digest=digest(list(documents)), documents=documents)

    @classmethod
    def read(cls, path: Path, field: str) -> Self:
        """Read a file.

        Args:
            path: UTF-8 text.
            field: What to name in errors.

        Raises:
            SpecError: It can't be read, is too large, or is not UTF-8.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise SpecError(field, f"can't read {path}: {error.strerror}") from error
        if len(data) > MAX_BYTES:
            raise SpecError(field, f"{path} has more than {MAX_BYTES} bytes: use an excerpt")
        try:
            return cls(digest=digest_bytes(data), documents=(data.decode(),))
        except UnicodeDecodeError as error:
            raise SpecError(field, f"{path} is not UTF-8 text: {error.reason}") from error


def of_inputs(inputs: RunInputs, folder: Path) -> dict[str, Text]:
    """Return the text of each workload class of a Job.

    Args:
        inputs: The run's inputs, with the digest of each class's text.
        folder: Holds ``<class>.txt`` for each class that does not use the built-in corpus.

    Raises:
        SpecError: A text is missing or is not the one the inputs name.
    """
    builtin = Text.builtin()
    texts = {}
    for name, wanted in inputs.classes.items():
        field = f"classes.{name}.text_digest"
        texts[name] = (
            builtin if wanted.text_digest is None else Text.read(folder / f"{name}.txt", field)
        )
        if wanted.text_digest not in (None, texts[name].digest):
            raise SpecError(
                field,
                f"is {wanted.text_digest}, but the text has {texts[name].digest}: "
                "it was edited after the run was planned",
            )
    return texts


def unique(texts: Mapping[str, Text]) -> dict[str, Text]:
    """Return the different texts by digest: classes that share a text share its measurements."""
    return {text.digest: text for text in texts.values()}
