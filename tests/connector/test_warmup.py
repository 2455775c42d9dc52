"""What is coded before anyone waits for it."""

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from kv_loopback import BLOCK, ENGINE, FORM, make_cache
from kvserve_connector.chunks import Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.ready import ReadyTable
from kvserve_connector.warmup import WarmUp
from kvserve_strategies import Pipeline, preset
from tables import table


class ListeningCoder(ChunkCoder):
    """A coder that remembers what it was made to do."""

    def __init__(self) -> None:
        super().__init__(FORM, lambda digest: None)
        self.warmed: list[tuple[str, set[int]]] = []
        self.coded: list[tuple[int, Chunk]] = []

    def warm_up(self, pipeline: Pipeline, chunk_layers: Collection[int] = (2,)) -> None:
        """See `ChunkCoder`."""
        self.warmed.append((pipeline.digest, set(chunk_layers)))
        super().warm_up(pipeline, chunk_layers)

    def encode(
        self,
        pipeline: Pipeline,
        chunk: Chunk,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        tokens_after: int = 0,
    ) -> memoryview:
        """See `ChunkCoder`."""
        self.coded.append((threading.get_ident(), chunk))
        return super().encode(pipeline, chunk, keys, values, tokens_after=tokens_after)


def test_each_thread_rehearses_a_chunk_of_full_size() -> None:
    """All of the threads, and none of them twice, code the first chunk of a transfer that fills the cache."""
    coder = ListeningCoder()
    with ThreadPoolExecutor(3) as coders:
        engine = replace(ENGINE, blocks=8)
        WarmUp(coder, make_cache(8, seed=1), 5).rehearse(coders, 3, engine)
    whole = Chunk(layers=range(1), tokens=range(7 * BLOCK))
    assert len({thread for thread, chunk in coder.coded if chunk == whole}) == 3


def test_a_table_warms_up_what_the_last_one_did_not_have() -> None:
    """Each pipeline is coded once, for both ways of cutting, as long as tables go on to have it."""
    coder = ListeningCoder()
    warm_up = WarmUp(coder, make_cache(), 5)
    digests = {name: preset(name).digest for name in ("none", "lossless", "int8-token")}
    for names, new in (
        (("none", "lossless"), ["none", "lossless"]),
        (("none", "lossless", "int8-token"), ["int8-token"]),
        (("none",), []),
        (("none", "lossless"), ["lossless"]),
    ):
        coder.warmed.clear()
        warm_up.of_table(ReadyTable.of(table(*names)))
        assert [digest for digest, _ in coder.warmed] == [digests[name] for name in new]
        assert all(ways == {5, 1} for _, ways in coder.warmed)
