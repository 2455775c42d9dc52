"""Prompt prefixes in a store: found, read back checked, and written by chunk."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kvserve_api.errors import WireError
from kvserve_connector.chunks import Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.form import Form
from kvserve_connector.stores.keys import (
    ChunkKey,
    Hit,
    Rate,
    find,
    keys_of,
    layer_groups,
    prefix_hashes,
    space_of,
)
from kvserve_connector.stores.store import Store
from kvserve_strategies import Pipeline

logger = logging.getLogger(__name__)

CHUNK_TOKENS: Final = 256
"""Tokens of a chunk: short enough for partial hits, long enough for coders with tables in each blob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Keys and values of a chunk, ``[layers, tokens, heads, dim]`` each."""

    chunk: Chunk
    keys: torch.Tensor
    values: torch.Tensor


class PrefixStore:
    """The prefixes of one model in a store; safe from any thread.

    Args:
        store: Where they lie.
        form: How the engine's cache is cut; not opaque.
        weights: See `kvserve_connector.stores.keys.space_of`.
        coder: Codes and checks blobs of this form.
        chunk_layers: Most layers of a blob, unless a strategy codes more of them together.
        chunk_tokens: Tokens of a chunk.
    """

    def __init__(
        self,
        store: Store,
        form: Form,
        weights: str,
        coder: ChunkCoder,
        *,
        chunk_layers: int = 5,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self._store = store
        self._coder = coder
        self._layers = form.layout.layers
        self._space = space_of(form, weights, chunk_tokens)
        self._chunk_layers = chunk_layers
        self._chunk_tokens = chunk_tokens

    def hashes(self, token_ids: Sequence[int], extras: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the names of a prompt's chunks."""
        return prefix_hashes(token_ids, self._chunk_tokens, extras)

    def find(
        self, prefixes: Sequence[str], pipelines: Sequence[Pipeline], *, timeout_s: float
    ) -> Hit:
        """Return how much of a prompt's start is there.

        Args:
            prefixes: The prompt's chunks.
            pipelines: What may be decoded and is good enough, the preferred first.
            timeout_s: Most seconds it may take.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        groups = {Rate.of(pipeline): self._groups(pipeline) for pipeline in pipelines}
        paths = [
            key.path
            for prefix in prefixes
            for rate, layers in groups.items()
            for key in keys_of(self._space, prefix, [rate], layers)
        ]
        present = self._store.exists(paths, timeout_s=timeout_s)
        return find(self._space, prefixes, list(groups), groups, present, self._chunk_tokens)

    def load(
        self,
        prefixes: Sequence[str],
        hit: Hit,
        pipelines: Sequence[Pipeline],
        *,
        timeout_s: float,
    ) -> Iterator[Piece]:
        """Yield what was found, chunk after chunk; it ends early where a chunk has gone or is not what it should be.

        A value that is damaged, or another one than its key says, is removed: the next writer puts it anew.

        Args:
            prefixes: The prompt's chunks.
            hit: What `find` said.
            pipelines: The same that were given to `find`.
            timeout_s: Most seconds for each value.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        groups = {Rate.of(pipeline): self._groups(pipeline) for pipeline in pipelines}
        for number, rate in enumerate(hit.rates):
            pieces: list[Piece] = []
            for key in keys_of(self._space, prefixes[number], [rate], groups[rate]):
                piece = self._get(key, number, timeout_s)
                if piece is None:
                    return
                pieces.append(piece)
            # a chunk counts only as a whole
            yield from pieces

    def save(
        self,
        prefixes: Sequence[str],
        pipeline: Pipeline,
        read: "Mapping[Chunk, tuple[torch.Tensor, torch.Tensor]]",
        *,
        timeout_s: float,
    ) -> int:
        """Put those chunks of a prompt that are not there at this rate, and return the bytes written.

        Args:
            prefixes: The prompt's chunks.
            pipeline: How to code them.
            read: Gives keys and values of a chunk.
            timeout_s: Most seconds for each value, and for looking what is there.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer, or has no room.
        """
        rate = Rate.of(pipeline)
        groups = self._groups(pipeline)
        keys = {p: keys_of(self._space, p, [rate], groups) for p in prefixes}
        paths = [key.path for each in keys.values() for key in each]
        present = self._store.exists(paths, timeout_s=timeout_s)
        written = 0
        for number, prefix in enumerate(prefixes):
            for key in keys[prefix]:
                if key.path in present:
                    continue
                chunk = self._chunk(key, number)
                blob = self._coder.encode(pipeline, chunk, *read[chunk])
                self._store.put(key.path, blob, timeout_s=timeout_s)
                written += len(blob)
        return written

    def _get(self, key: ChunkKey, number: int, timeout_s: float) -> Piece | None:
        chunk = self._chunk(key, number)
        try:
            blob = self._store.get(
                key.path, max_bytes=self._coder.max_bytes(chunk), timeout_s=timeout_s
            )
            if blob is None:
                return None
            keys, values = self._coder.decode(blob, chunk)
        except WireError as error:
            logger.warning("stored KV %s is removed: %s", key.path, error)
            self._store.delete(key.path, timeout_s=timeout_s)
            return None
        return Piece(chunk=chunk, keys=keys, values=values)

    def _chunk(self, key: ChunkKey, number: int) -> Chunk:
        start = number * self._chunk_tokens
        return Chunk(layers=key.layers, tokens=range(start, start + self._chunk_tokens))

    def _groups(self, pipeline: Pipeline) -> tuple[range, ...]:
        return layer_groups(self._layers, self._chunk_layers, pipeline.layer_step)
