"""Prompt prefixes in a store: what there is of a prompt, and the values it lies in, put and got with checks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvserve_api.errors import KVServeError, WireError
from kvserve_connector.chunks import MAX_CHUNK_BYTES, Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.form import Form
from kvserve_connector.stores import index
from kvserve_connector.stores.keys import (
    CHUNK_TOKENS,
    STEP_TOKENS,
    ChunkKey,
    Names,
    Rate,
    find,
    index_path,
    keys_of,
    layer_groups,
    names_of,
    space_of,
)
from kvserve_connector.stores.store import Store
from kvserve_strategies import Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One value of a store, as a prompt uses it.

    Attributes:
        key: Its key.
        chunk: What it holds.
        tokens: Those of its tokens that are the prompt's too, from its start on.
    """

    key: ChunkKey
    chunk: Chunk
    tokens: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What of a prompt can be had: values in the prompt's order, from some chunk's start without a gap."""

    values: tuple[Value, ...] = ()

    @property
    def stop(self) -> int:
        """Tokens of the prompt up to the end of what was found; 0 if nothing was."""
        return self.values[-1].tokens.stop if self.values else 0


class PrefixStore:
    """The prefixes of one model in a store; safe from any thread.

    Args:
        store: Where they lie.
        form: How the engine's cache is cut; not opaque.
        weights: See `kvserve_connector.stores.keys.space_of`.
        coder: Codes and checks blobs of this form.
        chunk_tokens: Tokens of a chunk.
        step_tokens: Prompts are compared in steps of so many tokens.
        most_bytes: Most native bytes of a value, unless a strategy codes more layers together.
    """

    def __init__(
        self,
        store: Store,
        form: Form,
        weights: str,
        coder: ChunkCoder,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        step_tokens: int = STEP_TOKENS,
        most_bytes: int = MAX_CHUNK_BYTES,
    ) -> None:
        self._store = store
        self._coder = coder
        self._layout = form.layout
        self._space = space_of(form, weights, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._step = step_tokens
        layer_bytes = form.layout.native_bytes(chunk_tokens) // form.layout.layers
        fitting = max(1, most_bytes // layer_bytes)
        # even ones: a small last value would only cost a round trip
        self._layers = -(-form.layout.layers // -(-form.layout.layers // fitting))

    def names(self, token_ids: Sequence[int], extras: Sequence[str] = ()) -> Names:
        """Return the names of a prompt's parts."""
        return names_of(token_ids, self._chunk_tokens, extras, self._step)

    def native_bytes(self, value: Value) -> int:
        """Return what a value holds, uncompressed."""
        return value.chunk.native_bytes(self._layout)

    def native_bytes_of(self, tokens: int) -> int:
        """Return what so many tokens have, uncompressed."""
        return self._layout.native_bytes(tokens)

    def find(
        self, names: Names, first: int, pipelines: Sequence[Pipeline], *, timeout_s: float
    ) -> Found:
        """Return what there is of a prompt.

        Args:
            names: Of its parts.
            first: The first chunk that is wanted.
            pipelines: What may be decoded and is good enough, the preferred first.
            timeout_s: Most seconds of each of up to four questions.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        groups = {Rate.of(pipeline): self._groups(pipeline) for pipeline in pipelines}
        chunks = names.chunks[first:]
        present = self._present(chunks[:1], groups, timeout_s)
        # a prompt's chunks are mostly of one rate, and most prompts are not there at all
        known = (
            {
                rate: layers
                for rate, layers in groups.items()
                if any(k.path in present for k in keys_of(self._space, chunks[0], [rate], layers))
            }
            if chunks
            else {}
        )
        if known:
            present |= self._present(chunks[1:], known, timeout_s)
        hit = find(self._space, chunks, list(known), known, present, self._chunk_tokens)
        values = [
            value
            for number, rate in enumerate(hit.rates, first)
            for value in self._values(
                names.chunks[number], number, self._chunk_tokens, rate, groups[rate]
            )
        ]
        values += self._begun(names, first + len(hit.rates), groups, timeout_s)
        return Found(values=tuple(values))

    def get(self, value: Value, *, timeout_s: float) -> bytearray | None:
        """Return a value's blob; None if it is not there.

        Raises:
            WireError: It is too large, or was not put under its key by a pod with our secret. It was removed.
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        most = self._coder.max_bytes(value.chunk)
        try:
            return self._store.get(value.key.path, max_bytes=most, timeout_s=timeout_s)
        except WireError as error:
            self._remove(value, error, timeout_s)
            raise

    def decode(
        self, value: Value, blob: bytearray, *, timeout_s: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[layers, tokens, heads, dim]`` of a whole value.

        Raises:
            WireError: It is damaged, or another one than its key says. It was removed: the next writer puts it anew.
        """
        try:
            return self._coder.decode(blob, value.chunk)
        except WireError as error:
            self._remove(value, error, timeout_s)
            raise

    def missing(
        self, names: Names, first: int, pipeline: Pipeline, *, timeout_s: float
    ) -> list[list[Value]]:
        """Return the values of a prompt that are not there at a rate, by chunk, its last part included.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        rate, groups = Rate.of(pipeline), self._groups(pipeline)
        wanted = [
            self._values(marks[-1], number, len(marks) * self._step, rate, groups)
            for number in range(first, -(-len(names.marks) // names.chunk_marks))
            if (marks := names.marks_of(number))
        ]
        paths = [value.key.path for values in wanted for value in values]
        present = self._store.exists(paths, timeout_s=timeout_s)
        left = [[v for v in values if v.key.path not in present] for values in wanted]
        return [values for values in left if values]

    def encode(
        self,
        value: Value,
        pipeline: Pipeline,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens_after: int,
    ) -> memoryview:
        """Return the blob of a value; see `kvserve_connector.coding.ChunkCoder.encode`."""
        return self._coder.encode(pipeline, value.chunk, keys, values, tokens_after=tokens_after)

    def put(self, value: Value, blob: memoryview, *, timeout_s: float) -> None:
        """Put a value.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer, or has no room.
        """
        self._store.put(value.key.path, blob, timeout_s=timeout_s)

    def list_behind(self, names: Names, chunk: int, *, timeout_s: float) -> None:
        """Add a chunk of a prompt to the list of what lies behind the one before it.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer, or has no room.
        """
        path = index_path(self._space, names.parent(chunk))
        children = self._children(path, names, timeout_s)
        longer = index.add(children, names.marks_of(chunk))
        if longer != children:
            self._store.put(path, index.pack(longer), timeout_s=timeout_s)

    def _begun(
        self,
        names: Names,
        chunk: int,
        groups: dict[Rate, tuple[range, ...]],
        timeout_s: float,
    ) -> list[Value]:
        """Return the values of a chunk that begins like a prompt's, which may be shorter or go another way later."""
        wanted = names.marks_of(chunk)
        if not wanted:
            return []
        path = index_path(self._space, names.parent(chunk))
        child, shared = index.longest(self._children(path, names, timeout_s), wanted)
        if not shared:
            return []
        present = self._present(child[-1:], groups, timeout_s)
        for rate, layers in groups.items():
            values = self._values(child[-1], chunk, len(child) * self._step, rate, layers, shared)
            if all(value.key.path in present for value in values):
                return values
        return []

    def _children(self, path: str, names: Names, timeout_s: float) -> index.Children:
        try:
            value = self._store.get(path, max_bytes=index.MAX_BYTES, timeout_s=timeout_s)
        except WireError:
            return ()
        return index.parse(value, names.chunk_marks)

    def _present(
        self, chunks: Sequence[str], groups: dict[Rate, tuple[range, ...]], timeout_s: float
    ) -> frozenset[str]:
        paths = [
            key.path
            for chunk in chunks
            for rate, layers in groups.items()
            for key in keys_of(self._space, chunk, [rate], layers)
        ]
        return self._store.exists(paths, timeout_s=timeout_s) if paths else frozenset()

    def _values(
        self,
        name: str,
        number: int,
        tokens: int,
        rate: Rate,
        groups: tuple[range, ...],
        shared: int | None = None,
    ) -> list[Value]:
        start = number * self._chunk_tokens
        used = tokens if shared is None else shared * self._step
        return [
            Value(
                key=key,
                chunk=Chunk(layers=key.layers, tokens=range(start, start + tokens)),
                tokens=range(start, start + used),
            )
            for key in keys_of(self._space, name, [rate], groups)
        ]

    def _remove(self, value: Value, why: WireError, timeout_s: float) -> None:
        logger.warning("stored KV %s is removed: %s", value.key.path, why)
        try:
            self._store.delete(value.key.path, timeout_s=timeout_s)
        except KVServeError as error:
            logger.warning("it could not be removed: %s", error)

    def _groups(self, pipeline: Pipeline) -> tuple[range, ...]:
        return layer_groups(self._layout.layers, self._layers, pipeline.layer_step)
