"""Writes prompts that were computed here into a store, in a thread that gives way to all others."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvserve_api.errors import KVServeError, TransferError, TransferReason
from kvserve_api.telemetry import (
    ATTR_NATIVE_BYTES,
    ATTR_PROFILE,
    ATTR_TOKENS,
    ATTR_WIRE_BYTES,
    ATTR_WORKLOAD,
    SPAN_STORE_SAVE,
)
from kvserve_connector import tracing
from kvserve_connector.cache import EngineCache
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.messages import StoreSave
from kvserve_connector.stores.prefixes import PrefixStore, Value
from kvserve_connector.stores.rates import Coding

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 32
"""Prompts that wait to be saved; more are not saved."""
HOLD_S: Final = 30.0
"""A prompt's blocks are not held longer for a save that began: what is stored by then stays."""
NICE: Final = 10
"""How far the thread stands back behind the engine's own, see nice(1)."""
QUEUE_FULL: Final = "QueueFull"
"""Why a prompt is not saved that comes while too many wait."""
DROPPED: Final = "Preempted"
"""Why a prompt is not saved whose blocks were taken away."""

Choose = Callable[[str, int, int], Coding]
"""Returns the coding for a workload class, so many native bytes, and so many values."""


@dataclass(kw_only=True, slots=True)
class Saved:
    """How a save ended.

    Attributes:
        request_id: Whose prompt it was.
        profile: What it was coded with; empty if it did not come to that.
        values: Values put.
        tokens: Tokens in them.
        native_bytes: Their native bytes.
        wire_bytes: Bytes put.
        encode_s: Seconds of reading the cache and encoding.
        put_s: Seconds of putting.
        total_s: From its turn to its end.
        failure: Empty, or why not all was saved.
        detail: More about it, for people.
    """

    request_id: str
    profile: str = ""
    values: int = 0
    tokens: int = 0
    native_bytes: int = 0
    wire_bytes: int = 0
    encode_s: float = 0.0
    put_s: float = 0.0
    total_s: float = 0.0
    failure: str = ""
    detail: str = ""


class PrefixWriter:
    """Saves one prompt after the other.

    When a save's end is reported, nobody reads its blocks any more.

    Args:
        config: Of the store.
        prefixes: What lies in the store.
        cache: The engine's KV cache.
        choose: Decides how a prompt is coded.
        saved: Takes the end of each save.
    """

    def __init__(
        self,
        config: StoreConfig,
        prefixes: PrefixStore,
        cache: EngineCache,
        choose: Choose,
        saved: Callable[[Saved], None],
    ) -> None:
        self._config = config
        self._prefixes = prefixes
        self._cache = cache
        self._choose = choose
        self._saved = saved
        self._waiting: queue.Queue[StoreSave | None] = queue.Queue(MAX_WAITING)
        # held while blocks are read: who drops them waits for no more than one value
        self._reading = threading.Lock()
        self._dropped: set[str] = set()
        self._pending: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvserve-save", daemon=True)
        self._thread.start()

    def add(self, save: StoreSave) -> None:
        """Have a prompt saved; its end is always reported."""
        request_id = save.prompt.request_id
        with self._reading:
            self._pending.add(request_id)
        try:
            self._waiting.put_nowait(save)
        except queue.Full:
            self._end(Saved(request_id=request_id, failure=QUEUE_FULL, detail="too many wait"))

    def drop(self, request_id: str) -> None:
        """Read a request's blocks no more: when this returns, nobody does."""
        with self._reading:
            if request_id in self._pending:
                self._dropped.add(request_id)

    def close(self) -> None:
        """End the thread; what waits is not saved."""
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)

    def _run(self) -> None:
        # of this thread only, on Linux
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (save := self._waiting.get()) is not None and not self._closed:
            self._end(self._save(save))

    def _end(self, outcome: Saved) -> None:
        with self._reading:
            self._pending.discard(outcome.request_id)
            self._dropped.discard(outcome.request_id)
        self._saved(outcome)

    def _save(self, save: StoreSave) -> Saved:
        prompt = save.prompt
        outcome = Saved(request_id=prompt.request_id)
        started_s = time.monotonic()
        try:
            with tracing.span(SPAN_STORE_SAVE, prompt.traceparent) as span:
                try:
                    self._put_missing(save, outcome, started_s + HOLD_S)
                finally:
                    span.set_attribute(ATTR_WORKLOAD, prompt.workload)
                    span.set_attribute(ATTR_PROFILE, outcome.profile)
                    span.set_attribute(ATTR_TOKENS, outcome.tokens)
                    span.set_attribute(ATTR_NATIVE_BYTES, outcome.native_bytes)
                    span.set_attribute(ATTR_WIRE_BYTES, outcome.wire_bytes)
        except KVServeError as error:
            outcome.failure, outcome.detail = error.reason, str(error)
        except MemoryError as error:
            outcome.failure, outcome.detail = TransferReason.OUT_OF_MEMORY, str(error)
        except _DroppedError:
            outcome.failure, outcome.detail = DROPPED, "its blocks were taken away"
        except Exception as error:
            logger.exception("saving %s in the KV store failed", prompt.request_id)
            outcome.failure, outcome.detail = KVServeError.reason, str(error)
        outcome.total_s = time.monotonic() - started_s
        return outcome

    def _put_missing(self, save: StoreSave, outcome: Saved, deadline_s: float) -> None:
        """Put what is not there yet, chunk after chunk, and have it found."""
        token_ids = np.frombuffer(save.prompt.tokens, dtype=np.int32).tolist()
        names = self._prefixes.names(token_ids, save.prompt.extras)
        first = save.start // self._config.chunk_tokens
        timeout_s = self._config.timeout_s
        tokens = len(token_ids) - first * self._config.chunk_tokens
        coding = self._choose(
            save.prompt.workload,
            self._prefixes.native_bytes_of(tokens),
            -(-tokens // self._config.chunk_tokens),
        )
        for values in self._prefixes.missing(names, first, coding.pipeline, timeout_s=timeout_s):
            for value in values:
                if time.monotonic() > deadline_s:
                    raise TransferError(TransferReason.TIMEOUT, "the KV store took too long")
                started_s = time.monotonic()
                blob = self._encode(save, value, coding, len(token_ids))
                encoded_s = time.monotonic()
                self._prefixes.put(value, blob, timeout_s=timeout_s)
                outcome.put_s += time.monotonic() - encoded_s
                outcome.encode_s += encoded_s - started_s
                outcome.profile = coding.name
                outcome.values += 1
                outcome.native_bytes += self._prefixes.native_bytes(value)
                outcome.wire_bytes += len(blob)
            outcome.tokens += len(values[0].tokens)
            number = values[0].tokens.start // self._config.chunk_tokens
            self._prefixes.list_behind(names, number, timeout_s=timeout_s)

    def _encode(self, save: StoreSave, value: Value, coding: Coding, total: int) -> memoryview:
        with self._reading:
            if save.prompt.request_id in self._dropped:
                raise _DroppedError
            keys, values = self._cache.read(value.chunk, (save.block_ids,))
        after = total - value.chunk.tokens.stop
        return self._prefixes.encode(value, coding.pipeline, keys, values, after)


class _DroppedError(Exception):
    """A request's blocks were taken away."""
