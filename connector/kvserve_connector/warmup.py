"""Coding made fast before anyone waits for it: once when a pod starts, and for each table before it is in force."""

import threading
from concurrent.futures import Executor
from typing import Final

from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import ahead_layers, plan_form
from kvserve_connector.coding import ChunkCoder, raw_pipeline
from kvserve_connector.engine import Engine
from kvserve_connector.midway import common_step
from kvserve_connector.ready import ReadyTable
from kvserve_strategies import Pipeline

REHEARSED_TOKENS: Final = 8192
"""Tokens of a transfer whose first chunk is coded before the first request."""


class WarmUp:
    """Makes the coding of one engine's cache fast.

    Args:
        coder: Codes its chunks.
        cache: The engine's KV cache.
        chunk_layers: Most layers in a chunk.
    """

    def __init__(self, coder: ChunkCoder, cache: EngineCache, chunk_layers: int) -> None:
        self._coder = coder
        self._cache = cache
        self._chunk_layers = chunk_layers
        self._warm: tuple[Pipeline, ...] = ()

    def rehearse(self, coders: Executor, threads: int, engine: Engine) -> None:
        """Do once, in each of the threads that will code, what a transfer does, at its full size.

        Some of what a thread needs is set up when it first works on as much as this, like the threads of torch's own
        that help it: no request shall wait for that.

        Args:
            coders: The threads.
            threads: How many there are.
            engine: Tells how many blocks the cache has, and what they hold.
        """
        # no thread may take the turn of another
        together = threading.Barrier(threads)
        rehearsals = [coders.submit(self._rehearse, together, engine) for _ in range(threads)]
        for rehearsal in rehearsals:
            rehearsal.result()

    def of_table(self, ready: ReadyTable) -> None:
        """Code with each pipeline that the last table did not have: tables that only learned something come often."""
        pipelines = tuple(ready.pipelines.values())
        steps = [pipeline.layer_step for pipeline in pipelines]
        ways = set[int]()
        for most in (self._chunk_layers, ahead_layers(self._cache.form, self._chunk_layers)):
            # as plans are made for it alone, and for others to go on with
            multiples = {1} | {common_step(step, steps, most) for step in steps}
            ways |= {max(multiple, most // multiple * multiple) for multiple in multiples}
        for pipeline in pipelines:
            if not any(pipeline is warm for warm in self._warm):
                self._coder.warm_up(pipeline, ways)
        self._warm = pipelines

    def _rehearse(self, together: threading.Barrier, engine: Engine) -> None:
        together.wait()
        self._coder.warm_up(raw_pipeline())
        blocks = tuple(range(1, engine.blocks))
        tokens = min(len(blocks) * group.block_tokens for group in engine.groups)
        for chunk in plan_form(self._cache.form, range(min(tokens, REHEARSED_TOKENS)), 1)[:1]:
            keys, values = self._cache.read(chunk, [blocks] * len(engine.groups))
            self._coder.encode(raw_pipeline(), chunk, keys, values)
