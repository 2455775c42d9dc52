"""Prompt prefixes go into stores and come back as they were, or not at all."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kv_loopback import FORM, LAYOUT, LoopbackCache, make_cache
from kvserve_api.errors import WireError
from kvserve_connector.chunks import Chunk
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.stores.prefixes import PrefixStore, Value
from kvserve_connector.stores.store import Buffer, GuardedStore, Store
from kvserve_strategies import PRESETS, Pipeline
from store_kinds import KINDS, Clock

CHUNK, STEP = 32, 16
TOKENS = list(range(100, 200))
WHOLE = 96
RAW, LOSSLESS, INT8, INT4 = (
    Pipeline.of(PRESETS[name]) for name in ("none", "lossless", "int8-token", "int4-token")
)
BLOCKS = tuple(range(1, 12))
SOON = 5.0


def prefixes_of(store: Store, weights: str = "model@1") -> PrefixStore:
    """Return the prefixes of the loopback's model in a store, two values a chunk."""
    coder = ChunkCoder(FORM, lambda _: None)
    most_bytes = LAYOUT.native_bytes(CHUNK) * 5 // LAYOUT.layers
    return PrefixStore(
        store,
        FORM,
        weights,
        coder,
        chunk_tokens=CHUNK,
        step_tokens=STEP,
        most_bytes=most_bytes,
    )


def save(
    prefixes: PrefixStore,
    tokens: Sequence[int],
    pipeline: Pipeline,
    cache: LoopbackCache,
    first: int = 0,
) -> int:
    """Save what of a prompt is missing, and return how many values that were."""
    names = prefixes.names(tokens)
    missing = prefixes.missing(names, first, pipeline, timeout_s=SOON)
    for values in missing:
        for value in values:
            keys, states = cache.read(value.chunk, (BLOCKS,))
            prefixes.put(value, prefixes.encode(value, pipeline, keys, states, 0), timeout_s=SOON)
        prefixes.list_behind(names, values[0].tokens.start // CHUNK, timeout_s=SOON)
    return sum(map(len, missing))


def find(
    prefixes: PrefixStore, tokens: Sequence[int], *pipelines: Pipeline, first: int = 0
) -> tuple[Value, ...]:
    """Find what there is of a prompt."""
    return prefixes.find(prefixes.names(tokens), first, pipelines, timeout_s=SOON).values


def get(prefixes: PrefixStore, value: Value) -> tuple[torch.Tensor, torch.Tensor]:
    """Get and decode a value."""
    blob = prefixes.get(value, timeout_s=SOON)
    assert blob is not None
    return prefixes.decode(value, blob, timeout_s=SOON)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pipeline", [RAW, LOSSLESS], ids=["raw", "lossless"])
def test_a_prefix_comes_back(kind: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """A prompt comes back bit by bit, for another as far as both begin alike, to a step, and is saved once."""
    prefixes = prefixes_of(KINDS[kind](tmp_path, Clock()))
    cache = make_cache(seed=3)
    assert save(prefixes, TOKENS, pipeline, cache) == 6
    assert save(prefixes, TOKENS, pipeline, cache) == 0
    for prompt, stop in (
        (TOKENS, WHOLE),
        (TOKENS[:70] + [7] * 30, 64),
        (TOKENS[:81] + [7] * 30, 80),
        (TOKENS[:20], 16),
        ([7, *TOKENS], 0),
    ):
        values = find(prefixes, prompt, pipeline)
        target = make_cache()
        for value in values:
            keys, states = get(prefixes, value)
            part = Chunk(layers=value.chunk.layers, tokens=value.tokens)
            used = len(value.tokens)
            target.write(part, (BLOCKS,), keys[:, :used], states[:, :used])
        assert (values[-1].tokens.stop if values else 0) == stop
        if stop:
            layers, tokens = range(LAYOUT.layers), range(stop)
            ours, theirs = (c.read_tokens(layers, tokens, BLOCKS) for c in (cache, target))
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_a_prompts_last_part_is_found_by_those_who_go_on(tmp_path: Path) -> None:
    """What is left behind the last whole chunk is stored too, to a step, and replaced in the list by what is longer."""
    prefixes = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    cache = make_cache(seed=3)
    assert save(prefixes, TOKENS[:55], RAW, cache) == 4
    (first, _, second, _) = find(prefixes, TOKENS, RAW)
    assert (first.tokens, second.tokens, second.chunk.tokens) == (
        range(32),
        range(32, 48),
        range(32, 48),
    )
    assert save(prefixes, TOKENS, RAW, cache, first=1) == 4
    assert {value.chunk.tokens for value in find(prefixes, TOKENS[:50], RAW)} == {
        range(32),
        range(32, 64),
    }


def test_what_is_here_is_not_asked_for(tmp_path: Path) -> None:
    """The chunks before the first wanted one need not be there at all."""
    prefixes = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    save(prefixes, TOKENS, RAW, make_cache(seed=3), first=1)
    assert find(prefixes, TOKENS, RAW) == ()
    values = find(prefixes, TOKENS, RAW, first=1)
    assert (values[0].tokens.start, values[-1].tokens.stop) == (32, WHOLE)


def test_rates_lie_side_by_side(tmp_path: Path) -> None:
    """A prompt stored at two rates is read at the one the reader prefers, and by nobody who allows neither."""
    prefixes = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    cache = make_cache(seed=3)
    save(prefixes, TOKENS, INT4, cache)
    save(prefixes, TOKENS[:CHUNK], INT8, cache)
    values = find(prefixes, TOKENS, INT8, INT4)
    assert values[-1].tokens.stop == WHOLE
    errors = [
        (get(prefixes, value)[0] - cache.read(value.chunk, (BLOCKS,))[0]).abs().max().item()
        for value in values
    ]
    # both groups of layers of the first chunk with 8 bits, then with 4
    assert max(errors[:2]) < 0.05 < min(errors[2:])
    assert find(prefixes, TOKENS, LOSSLESS) == ()
    assert find(prefixes_of(KINDS["folder"](tmp_path, Clock()), "model@2"), TOKENS, INT8) == ()


@pytest.mark.parametrize("pipeline", [INT8, INT4], ids=["int8", "int4"])
def test_what_is_stored_again_loses_nothing_more(pipeline: Pipeline, tmp_path: Path) -> None:
    """A prefix that was fetched and is stored again, inside a longer chunk, comes back as it was fetched."""
    cache, fetched, again = make_cache(seed=3), make_cache(seed=3), make_cache()
    half = CHUNK // 2
    for number, (source, target, stop) in enumerate(
        [(cache, fetched, half), (fetched, again, CHUNK)]
    ):
        prefixes = prefixes_of(KINDS["folder"](tmp_path / str(number), Clock()))
        assert save(prefixes, TOKENS[:stop], pipeline, source) == 2
        for value in find(prefixes, TOKENS, pipeline):
            target.write(value.chunk, (BLOCKS,), *get(prefixes, value))
    first, second, original = (
        torch.stack(each.read_tokens(range(LAYOUT.layers), range(half), BLOCKS))
        for each in (fetched, again, cache)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, original)


def damage(value: bytearray) -> Buffer:
    """Flip a bit in the middle."""
    value[len(value) // 2] ^= 4
    return value


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        pytest.param(damage, "ChecksumMismatch", id="flipped"),
        pytest.param(lambda value: value[:-1], "Truncated", id="cut"),
        pytest.param(lambda value: value + b"\0" * 500_000, "TooLarge", id="grown"),
        pytest.param(lambda _: b"", "Truncated", id="empty"),
        pytest.param(lambda _: b"<html>not found</html>" * 9, "BadMagic", id="another-thing"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_lying_store_is_not_believed(
    kind: str, harm: object, reason: str, tmp_path: Path
) -> None:
    """A value that is not what was put is refused with its reason and removed, so that it is put anew."""
    store = GuardedStore(KINDS[kind](tmp_path, Clock()))
    prefixes = prefixes_of(store)
    cache = make_cache(seed=3)
    save(prefixes, TOKENS, LOSSLESS, cache)
    # the second group of layers of the second chunk
    victim = find(prefixes, TOKENS, LOSSLESS)[3]
    path = victim.key.path
    value = store.get(path, max_bytes=1 << 20, timeout_s=SOON)
    store.put(path, harm(value), timeout_s=SOON)  # type: ignore[operator]
    assert len(find(prefixes, TOKENS, LOSSLESS)) == 6
    with pytest.raises(WireError) as caught:
        get(prefixes, victim)
    assert caught.value.reason == reason
    assert store.exists([path], timeout_s=SOON) == frozenset()
    assert len(find(prefixes, TOKENS, LOSSLESS)) == 2
    assert save(prefixes, TOKENS, LOSSLESS, cache) == 1
    assert len(find(prefixes, TOKENS, LOSSLESS)) == 6


def test_swapped_values_are_not_believed(tmp_path: Path) -> None:
    """A whole blob of another place in the prompt, under a key that is not its own, is refused."""
    prefixes = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    save(prefixes, TOKENS, RAW, make_cache(seed=3))
    files = sorted(path for path in (tmp_path / "kv").rglob("0-4") if path.is_file())
    assert len(files) == 3
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    for value in find(prefixes, TOKENS, RAW)[::2]:
        with pytest.raises(WireError, match="RangeMismatch"):
            get(prefixes, value)


def test_a_value_may_go_between_finding_and_reading(tmp_path: Path) -> None:
    """What was evicted after it was found is told by its absence, not by an error."""
    prefixes = prefixes_of(KINDS["memory"](tmp_path, Clock()))
    save(prefixes, TOKENS, RAW, make_cache(seed=3))
    (first, *_) = find(prefixes, TOKENS, RAW)
    elsewhere = prefixes_of(KINDS["folder"](tmp_path, Clock()))
    assert elsewhere.get(first, timeout_s=SOON) is None


@pytest.mark.parametrize("content", [b"", b"[", b"7", b'[["x"]]', b"[[7]]", b"[[]]"])
def test_a_list_that_is_none_is_no_harm(content: bytes, tmp_path: Path) -> None:
    """A damaged list of what lies behind a chunk only costs the part that it would have found."""
    store = KINDS["memory"](tmp_path, Clock())
    prefixes = prefixes_of(store)
    save(prefixes, TOKENS[:48], RAW, make_cache(seed=3))
    (value, *_) = find(prefixes, TOKENS, RAW)
    parent = value.key.path.split("/")[:3]
    store.put("/".join([*parent, "next"]), content, timeout_s=SOON)
    assert find(prefixes, TOKENS, RAW)[-1].tokens.stop == CHUNK
