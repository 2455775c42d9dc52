"""Prompt prefixes go into stores and come back as they were, or not at all."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kv_loopback import FORM, LAYOUT, LoopbackCache, make_cache
from kvserve_connector.chunks import Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.stores.keys import Hit
from kvserve_connector.stores.prefixes import Piece, PrefixStore
from kvserve_connector.stores.store import Buffer, GuardedStore, Store
from kvserve_strategies import PRESETS, Pipeline
from store_kinds import KINDS, Clock

CHUNK = 32
TOKENS = list(range(100, 200))
RAW, LOSSLESS, INT8, INT4 = (
    Pipeline.of(PRESETS[name]) for name in ("none", "lossless", "int8-token", "int4-token")
)
BLOCKS = tuple(range(1, 12))
SOON = 5.0


class Reader(dict[Chunk, tuple[torch.Tensor, torch.Tensor]]):
    """Reads chunks of a cache when they are asked for."""

    def __init__(self, cache: LoopbackCache) -> None:
        super().__init__()
        self.cache = cache

    def __missing__(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a chunk."""
        return self.cache.read(chunk, (BLOCKS,))


def prefixes_of(store: Store, weights: str = "model@1") -> PrefixStore:
    """Return the prefixes of the loopback's model in a store."""
    coder = ChunkCoder(FORM, lambda _: None)
    return PrefixStore(store, FORM, weights, coder, chunk_tokens=CHUNK)


def load(
    prefixes: PrefixStore, tokens: Sequence[int], *pipelines: Pipeline
) -> tuple[Hit, list[Piece]]:
    """Find and load what there is of a prompt."""
    names = prefixes.hashes(tokens)
    hit = prefixes.find(names, pipelines, timeout_s=SOON)
    return hit, list(prefixes.load(names, hit, pipelines, timeout_s=SOON))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pipeline", [RAW, LOSSLESS], ids=["raw", "lossless"])
def test_a_prefix_comes_back(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """Whole chunks of a prompt come back bit by bit, for another prompt as far as it begins alike."""
    prefixes = prefixes_of(KINDS[kind](tmp_path, Clock()))
    cache = make_cache(seed=3)
    written = prefixes.save(prefixes.hashes(TOKENS), pipeline, Reader(cache), timeout_s=SOON)
    assert written > 0
    assert prefixes.save(prefixes.hashes(TOKENS), pipeline, Reader(cache), timeout_s=SOON) == 0
    for prompt, chunks in ((TOKENS, 3), (TOKENS[:70] + [7] * 30, 2), ([7, *TOKENS], 0)):
        hit, pieces = load(prefixes, prompt, pipeline)
        assert hit.tokens == chunks * CHUNK
        target = make_cache()
        for piece in pieces:
            target.write(piece.chunk, (BLOCKS,), piece.keys, piece.values)
        if chunks:
            layers, tokens = range(LAYOUT.layers), range(hit.tokens)
            ours, theirs = (c.read_tokens(layers, tokens, BLOCKS) for c in (cache, target))
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_rates_lie_side_by_side(tmp_path: Path) -> None:
    """A prompt stored at two rates is read at the one the reader prefers, and by nobody who allows neither."""
    prefixes = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    cache, names = make_cache(seed=3), prefixes.hashes(TOKENS)
    for pipeline, count in ((INT4, 3), (INT8, 1)):
        prefixes.save(names[:count], pipeline, Reader(cache), timeout_s=SOON)
    hit, pieces = load(prefixes, TOKENS, INT8, INT4)
    assert hit.tokens == 3 * CHUNK
    errors = [
        (piece.keys - cache.read(piece.chunk, (BLOCKS,))[0]).abs().max().item() for piece in pieces
    ]
    # layers 0 to 4 and 5 to 6 of the first chunk with 8 bits, then with 4
    assert max(errors[:2]) < 0.05 < min(errors[2:])
    assert load(prefixes, TOKENS, LOSSLESS)[0].tokens == 0
    assert load(prefixes_of(KINDS["folder"](tmp_path, Clock()), "model@2"), TOKENS, INT8)[1] == []


def damage(value: bytearray) -> Buffer:
    """Flip a bit in the middle."""
    value[len(value) // 2] ^= 4
    return value


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(damage, id="flipped"),
        pytest.param(lambda value: value[:-1], id="cut"),
        pytest.param(lambda value: value + b"\0" * 500_000, id="grown"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"<html>not found</html>", id="another-thing"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_lying_store_is_not_believed(kind: str, harm: object, tmp_path: Path) -> None:
    """A value that is not what was put ends the hit before its chunk, and is removed, so that it is put anew."""
    store = GuardedStore(KINDS[kind](tmp_path, Clock()))
    prefixes = prefixes_of(store)
    cache, names = make_cache(seed=3), prefixes.hashes(TOKENS)
    written: list[str] = []
    put = store.put

    def note(key: str, value: Buffer, *, timeout_s: float) -> None:
        written.append(key)
        put(key, value, timeout_s=timeout_s)

    store.put = note  # type: ignore[method-assign]
    prefixes.save(names, LOSSLESS, Reader(cache), timeout_s=SOON)
    # the second group of layers of the second chunk
    victim = written[3]
    value = store.get(victim, max_bytes=1 << 20, timeout_s=SOON)
    put(victim, harm(value), timeout_s=SOON)  # type: ignore[operator]
    hit, pieces = load(prefixes, TOKENS, LOSSLESS)
    assert hit.tokens == 3 * CHUNK
    assert {piece.chunk.tokens for piece in pieces} == {range(CHUNK)}
    assert store.exists([victim], timeout_s=SOON) == frozenset()
    prefixes.save(names, LOSSLESS, Reader(cache), timeout_s=SOON)
    assert len(load(prefixes, TOKENS, LOSSLESS)[1]) == 6


def test_swapped_values_are_not_believed(tmp_path: Path) -> None:
    """A whole blob of another place in the prompt, under a key that is not its own, is refused."""
    store = KINDS["folder"](tmp_path, Clock())
    prefixes = prefixes_of(store)
    prefixes.save(prefixes.hashes(TOKENS), RAW, Reader(make_cache(seed=3)), timeout_s=SOON)
    files = sorted(path for path in (tmp_path / "kv").rglob("0-5") if path.is_file())
    assert len(files) == 3
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    assert load(prefixes, TOKENS, RAW)[1] == []


def test_a_value_may_go_between_finding_and_reading(tmp_path: Path) -> None:
    """What was evicted after it was found ends what is loaded, without an error."""
    store = KINDS["memory"](tmp_path, Clock())
    prefixes = prefixes_of(store)
    names = prefixes.hashes(TOKENS)
    prefixes.save(names, RAW, Reader(make_cache(seed=3)), timeout_s=SOON)
    hit = prefixes.find(names, [RAW], timeout_s=SOON)
    rest = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    assert hit.tokens == 3 * CHUNK
    assert list(rest.load(names, hit, [RAW], timeout_s=SOON)) == []
