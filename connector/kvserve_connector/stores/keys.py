"""What a piece of a prompt's KV is called in a store, and which pieces are worth asking for.

A prompt is cut into chunks of equal length. The name of a chunk is the hash of its tokens and of the chunk before it,
so that equal names mean equal prompts up to there, whoever computed them (the scheme of vLLM's prefix cache). Beside
that the key says whose KV it is, and how it is coded: of one chunk several rates may lie side by side.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from kvserve_api.canonical import digest
from kvserve_connector.form import Form
from kvserve_strategies import Pipeline

VERSION: Final = "kv1"
CHUNK_TOKENS: Final = 512
"""Tokens of a chunk: in chunks of 256 a prefix takes calibrated strategies a third to a half longer to decode."""
STEP_TOKENS: Final = 16
"""Prompts are compared in steps of so many tokens."""
_HASH_BYTES: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One way to code a chunk.

    Attributes:
        family: Digest of what can decode it: stages and calibration bundle, whatever their steps and widths.
        strategy: Digest of the strategy itself.
    """

    family: str
    strategy: str

    @classmethod
    def of(cls, pipeline: Pipeline) -> "Rate":
        """Return the rate of a pipeline."""
        family = {"stages": sorted(pipeline.stage_ids), "bundle": pipeline.bundle_digest}
        return cls(family=_short(digest(family)), strategy=_short(pipeline.digest))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkKey:
    """The name of one blob.

    Attributes:
        space: See `space_of`.
        prefix: The name of the prompt up to its end, see `Names`.
        rate: How it is coded.
        layers: Which layers it holds.
    """

    space: str
    prefix: str
    rate: Rate
    layers: range

    @property
    def path(self) -> str:
        """The key as stores take it: letters, digits, ``-`` and ``/``, at most 200 characters."""
        layers = f"{self.layers.start}-{self.layers.stop}"
        parts = (self.space, self.prefix, self.rate.family, self.rate.strategy, layers)
        return "/".join((VERSION, *parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """What of a prompt can be had.

    Attributes:
        rates: For each chunk from the prompt's start on, the rate at which all its layers are there.
        chunk_tokens: Tokens of a chunk.
    """

    rates: tuple[Rate, ...]
    chunk_tokens: int

    @property
    def tokens(self) -> int:
        """How many tokens that is."""
        return len(self.rates) * self.chunk_tokens


def space_of(form: Form, weights: str, chunk_tokens: int) -> str:
    """Return the name of what must be equal for one engine's KV to serve another.

    Args:
        form: How the cache is cut; of an opaque one no chunk can stand alone, so it has no space.
        weights: What tells the weights apart that are served, like a checkpoint's name and revision: a store outlives
            them, and the model's fingerprint does not know them.
        chunk_tokens: Tokens of a chunk.

    Raises:
        ValueError: The cache is opaque, or no weights are named.
    """
    if form.opaque is not None or not weights:
        raise ValueError("only plain keys and values of named weights are stored")
    return _short(
        digest(
            {
                "model": form.fingerprint,
                "layout": form.layout.to_json(),
                "weights": weights,
                "tokens": chunk_tokens,
            }
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """What the parts of one prompt are called.

    Attributes:
        root: The name of nothing yet, which adapters and salts decide.
        marks: The names of its first 16, 32, … tokens. Those at a chunk's end are the names of chunks.
        chunk_marks: Marks of a chunk.
    """

    root: str
    marks: tuple[str, ...]
    chunk_marks: int

    @property
    def chunks(self) -> tuple[str, ...]:
        """The names of the whole chunks."""
        return self.marks[self.chunk_marks - 1 :: self.chunk_marks]

    def parent(self, chunk: int) -> str:
        """Return the name of what lies before a chunk."""
        return self.chunks[chunk - 1] if chunk else self.root

    def marks_of(self, chunk: int) -> tuple[str, ...]:
        """Return the marks inside a chunk, which may be the prompt's last and not whole."""
        return self.marks[chunk * self.chunk_marks : (chunk + 1) * self.chunk_marks]


def names_of(
    token_ids: Sequence[int],
    chunk_tokens: int,
    extras: Iterable[str] = (),
    step: int = STEP_TOKENS,
) -> Names:
    """Name the parts of a prompt.

    Args:
        token_ids: The prompt.
        chunk_tokens: Tokens of a chunk, a multiple of ``step``.
        extras: What else decides the KV: adapter names, hashes of images, in order.
        step: Tokens between two marks.
    """
    state = hashlib.blake2b(digest_size=_HASH_BYTES)
    for extra in extras:
        word = extra.encode()
        state.update(len(word).to_bytes(8, "little") + word)
    root = state.digest()
    tokens = np.asarray(token_ids, dtype=np.int64)
    marks: list[str] = []
    state = hashlib.blake2b(root, digest_size=_HASH_BYTES)
    for stop in range(step, len(tokens) + 1, step):
        state.update(tokens[stop - step : stop].tobytes())
        mark = state.digest()
        marks.append(mark.hex())
        if stop % chunk_tokens == 0:
            state = hashlib.blake2b(mark, digest_size=_HASH_BYTES)
    return Names(root=root.hex(), marks=tuple(marks), chunk_marks=chunk_tokens // step)


def layer_groups(layers: int, most: int, multiple: int = 1) -> tuple[range, ...]:
    """Cut layers into the groups that blobs hold: as many as are coded together, or the most multiple of it.

    Args:
        layers: Layers of the model.
        most: Most layers of a group.
        multiple: Layers that the strategy codes together.
    """
    step = max(multiple, most // multiple * multiple)
    return tuple(range(at, min(at + step, layers)) for at in range(0, layers, step))


def index_path(space: str, parent: str) -> str:
    """Return the key of the list of what was stored behind a chunk; see `kvserve_connector.stores.index`."""
    return "/".join((VERSION, space, parent, "next"))


def keys_of(
    space: str, prefix: str, rates: Iterable[Rate], groups: Iterable[range]
) -> list[ChunkKey]:
    """Return the keys of a chunk at these rates."""
    return [
        ChunkKey(space=space, prefix=prefix, rate=rate, layers=layers)
        for rate, layers in product(rates, groups)
    ]


def find(
    space: str,
    prefixes: Sequence[str],
    rates: Sequence[Rate],
    groups: dict[Rate, tuple[range, ...]],
    present: Collection[str],
    chunk_tokens: int,
) -> Hit:
    """Return how much of a prompt's start can be had, and at which rates.

    A chunk counts if all its layers are there at one rate. The first chunk that does not ends the hit: what lies behind
    it is of no use without it.

    Args:
        space: See `space_of`.
        prefixes: The prompt's chunks.
        rates: Those that may be used, the preferred first.
        groups: For each rate its groups of layers.
        present: Paths of the keys that are in the store.
        chunk_tokens: Tokens of a chunk.
    """
    found: list[Rate] = []
    for prefix in prefixes:
        rate = next(
            (
                rate
                for rate in rates
                if all(key.path in present for key in keys_of(space, prefix, [rate], groups[rate]))
            ),
            None,
        )
        if rate is None:
            break
        found.append(rate)
    return Hit(rates=tuple(found), chunk_tokens=chunk_tokens)


def _short(text: str) -> str:
    return text.removeprefix("sha256:")[:32]
