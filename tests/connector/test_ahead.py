"""Chunks that are coded before their consumer asks."""

import time
from collections.abc import Sequence

import pytest
import torch

from kv_loopback import LAYOUT, Pair, pair
from kvserve_connector.ahead import Ahead
from kvserve_connector.chunks import Chunk
from kvserve_connector.ready import ReadyTable
from tables import table

FROM, TO = (3, 9, 5, 20, 11), (1, 2, 4, 8, 16)
LAYERS = range(LAYOUT.layers)
TOKENS = 70
PLENTY = 1 << 20


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after 32 tokens and each layer."""
    monkeypatch.setattr("kvserve_connector.chunks.TOKEN_STEP", 32)


def ahead_of(both: Pair) -> Ahead:
    """Return what codes ahead."""
    ahead = both.server.pulls._ahead
    assert ahead is not None
    return ahead


def teach(both: Pair) -> None:
    """Pin a profile, and let a first consumer show what consumers can."""
    both.selector.install(ReadyTable.of(table(pinned="lossless")))
    both.lease("first", 20, FROM)
    assert both.fetch(both.load("first", range(20), TO)).failure == ""
    assert both.ended()[1] == {"Sent": 1}


def settled(both: Pair) -> int:
    """Wait until no more is coded ahead; return how many bytes are kept."""
    last = -1
    while (now := ahead_of(both).nbytes) != last:
        last = now
        time.sleep(0.2)
    return now


def count_reads(both: Pair) -> list[Chunk]:
    """Return a list that grows with every chunk that is read from the cache."""
    read, seen = both.source.read, list[Chunk]()

    def counted(
        chunk: Chunk, block_ids: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(chunk)
        return read(chunk, block_ids)

    both.source.read = counted  # type: ignore[method-assign]
    return seen


def equal(both: Pair) -> bool:
    """Tell whether the target holds what the source held."""
    ours = both.source.read_tokens(LAYERS, range(TOKENS), FROM)
    theirs = both.target.read_tokens(LAYERS, range(TOKENS), TO)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_what_was_coded_ahead_is_sent() -> None:
    """When the consumer asks, nothing is read or coded any more, what arrives is right, and the memory is free."""
    with pair(encode_ahead_bytes=PLENTY) as both:
        teach(both)
        both.begin("a", TOKENS)
        both.advance("a", 32, FROM)
        some = settled(both)
        both.lease("a", TOKENS, FROM)
        assert 0 < some < settled(both)
        reads = count_reads(both)
        outcome = both.fetch(both.load("a", range(TOKENS), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert outcome.accept.profile == "lossless"
        assert reads == []
        assert equal(both)
        assert outcome.end is not None
        assert outcome.end.encode_s > 0
        assert ahead_of(both).nbytes == 0


@pytest.mark.parametrize(
    ("profile", "start"), [("none", 0), ("lossless", 16)], ids=["another-profile", "a-part"]
)
def test_what_is_not_wanted_is_coded_anew(profile: str, start: int) -> None:
    """Another choice when the consumer asks, or a consumer that has the start, gets what it should."""
    with pair(encode_ahead_bytes=PLENTY) as both:
        teach(both)
        both.begin("a", TOKENS)
        both.advance("a", TOKENS, FROM)
        assert settled(both) > 0
        both.lease("a", TOKENS, FROM)
        both.selector.install(ReadyTable.of(table(pinned=profile)))
        head = both.source.read_tokens(LAYERS, range(start), FROM) if start else None
        if head is not None:
            both.target.write_tokens(LAYERS, range(start), TO, *head)
        outcome = both.fetch(both.load("a", range(start, TOKENS), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert outcome.accept.profile == profile
        assert equal(both)
        assert ahead_of(both).nbytes == 0


def test_memory_is_bounded() -> None:
    """At most one chunk more than the limit is kept, and the rest is coded when it is sent."""
    with pair(encode_ahead_bytes=1) as both:
        teach(both)
        both.begin("a", TOKENS)
        both.lease("a", TOKENS, FROM)
        both.begin("b", TOKENS)
        both.advance("b", TOKENS, FROM)
        kept = settled(both)
        assert 0 < kept < LAYOUT.native_bytes(32)
        assert both.fetch(both.load("a", range(TOKENS), TO)).failure == ""
        assert equal(both)


@pytest.mark.parametrize("end", ["aborted", "expired"])
def test_memory_is_freed_when_nobody_asks(end: str) -> None:
    """A prefill that ends without a consumer leaves nothing behind."""
    with pair(encode_ahead_bytes=PLENTY, lease_s=0.8) as both:
        teach(both)
        both.begin("a", TOKENS)
        both.advance("a", TOKENS, FROM)
        assert settled(both) > 0
        if end == "aborted":
            both.leases.stop("a")
        else:
            both.lease("a", TOKENS, FROM)
            assert both.ended() == ({"a"}, {"Expired": 1})
        deadline_s = time.monotonic() + 5
        while ahead_of(both).nbytes and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert ahead_of(both).nbytes == 0


def test_nothing_is_guessed_of_unknown_consumers() -> None:
    """Before the first consumer nothing is coded ahead, nor where the last one would get raw KV."""
    with pair(encode_ahead_bytes=PLENTY) as both:
        both.selector.install(ReadyTable.of(table(pinned="lossless")))
        both.begin("a", TOKENS)
        both.advance("a", TOKENS, FROM)
        assert settled(both) == 0
        teach(both)
        both.selector.install(ReadyTable.of(table(pinned="none")))
        both.begin("b", TOKENS)
        both.leases.stop("a")
        both.advance("b", TOKENS, FROM)
        assert settled(both) == 0
