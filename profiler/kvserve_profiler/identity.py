"""What a run is about: which model, known without loading its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvserve_api.canonical import digest
from kvserve_profiler.model import Source, fingerprint

SAMPLE_BYTES: Final = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A model as its files tell.

    Attributes:
        fingerprint: Of the form of its KV cache; what serving pods compare.
        weights: Of its weight files; empty for a model from the hub, whose revision names them.
    """

    fingerprint: str
    weights: str


def identify(source: Source) -> Identity:
    """Return a model's identity.

    Raises:
        SpecError: There is no model.
        UnsupportedError: See `Source.config`.
    """
    return Identity(fingerprint=fingerprint(source.config()), weights=weights(source))


def weights(source: Source) -> str:
    """Return a digest of names, sizes, beginnings and ends of the weight files.

    Reading a large model whole would take minutes; other weights differ at both ends of every file.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        return ""
    return digest([_sample(path) for path in sorted(folder.glob("*.safetensors"))])


def _sample(path: Path) -> list[str | int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(SAMPLE_BYTES)
        file.seek(max(0, size - SAMPLE_BYTES))
        last = file.read(SAMPLE_BYTES)
    return [path.name, size, hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()]
