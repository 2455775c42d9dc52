"""Transfers that begin before their prefill has ended, over loopback TCP."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kv_loopback import LAYOUT, Pair, pair
from kvserve_connector.chunks import Chunk
from kvserve_connector.control_messages import report_message
from kvserve_connector.handover import Lease

FROM, TO = (3, 9, 5, 20, 11), (1, 2, 4, 8, 16)
LAYERS = range(LAYOUT.layers)
TOKENS = 70


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after 32 tokens and each layer, as a real transfer is cut after thousands and some."""
    monkeypatch.setattr("kvserve_connector.chunks.TOKEN_STEP", 32)


def equal(both: Pair, layers: range, tokens: range, blocks: tuple[int, ...] = FROM) -> bool:
    """Tell whether the target holds what the source held."""
    ours = both.source.read_tokens(layers, tokens, blocks)
    theirs = both.target.read_tokens(layers, tokens, TO)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def soon(both: Pair, layers: range, tokens: range) -> bool:
    """Wait until the target holds what the source held."""
    deadline_s = time.monotonic() + 5
    while not equal(both, layers, tokens) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return equal(both, layers, tokens)


def start(both: Pair) -> str:
    """Ask for the KV of transfer x before its prefill has come; return the request's name."""
    load = both.load("x", range(TOKENS), TO, transfer=True)
    both.client.start(load)
    return load.request_id


def finish(both: Pair, blocks: tuple[int, ...] = FROM) -> None:
    """Have prefill a end well."""
    both.lease("a", TOKENS, blocks)


def test_chunks_go_out_as_they_are_computed() -> None:
    """Tokens arrive step by step, in the last step layer by layer; nothing arrives that is not computed yet."""
    with pair() as both:
        request_id = start(both)
        time.sleep(0.1)
        both.begin("a", TOKENS, "x")
        both.advance("a", 32, FROM)
        assert soon(both, LAYERS, range(32))
        both.advance("a", TOKENS, FROM, layers=3)
        assert soon(both, range(3), range(TOKENS))
        time.sleep(0.1)
        keys, values = both.target.read_tokens(range(3, LAYOUT.layers), range(32, TOKENS), TO)
        assert not keys.any()
        assert not values.any()
        both.advance("a", TOKENS, FROM)
        outcome = both.outcome(request_id)
        assert outcome.failure == ""
        assert equal(both, LAYERS, range(TOKENS))
        # everything is there before the news of the prefill's end; then its blocks are free at once
        assert both.leases.take_ended() == (set(), {})
        finish(both)
        assert both.ended() == ({"a"}, {"Sent": 1})


def test_waiting_is_neither_silence_nor_the_transfers_time() -> None:
    """A prefill that takes longer than a peer may be silent is waited for, and not counted as transfer."""
    with pair(stall_s=1.5, timeout_s=1.5) as both:
        request_id = start(both)
        # the prefill waits behind others, and nothing is known of it before its turn
        time.sleep(1.7)
        both.begin("a", TOKENS, "x")
        time.sleep(0.8)
        finish(both)
        outcome = both.outcome(request_id)
        assert outcome.failure == ""
        assert 0 <= outcome.exposed_s <= outcome.total_s < 0.7
        assert outcome.end is not None
        assert outcome.end.waited_s > 2.4
        assert outcome.accept is not None
        assert outcome.accept.model_s == 0.5


def test_what_is_hidden_behind_the_prefill_is_told_apart() -> None:
    """A chunk that takes half a second while the prefill goes on is the transfer's time, but nobody waited for it."""
    with pair() as both:
        read = both.source.read

        def slow_read(
            chunk: Chunk, block_ids: Sequence[Sequence[int]]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if chunk.tokens.stop <= 32 and chunk.layers.start == 0:
                time.sleep(0.5)
            return read(chunk, block_ids)

        both.source.read = slow_read  # type: ignore[method-assign]
        request_id = start(both)
        both.begin("a", TOKENS, "x")
        both.advance("a", 32, FROM)
        assert soon(both, LAYERS, range(32))
        finish(both)
        outcome = both.outcome(request_id)
        assert outcome.failure == ""
        assert outcome.total_s - outcome.exposed_s > 0.4
        assert report_message(outcome).exposed_s == outcome.exposed_s


def test_preempted_prefill_is_sent_from_its_new_blocks() -> None:
    """What was read while its blocks were taken away is thrown away and read again; what was sent stays right."""
    other = (21, 22, 23, 24, 25)
    with pair() as both:
        both.source.write_tokens(
            LAYERS, range(TOKENS), other, *both.source.read_tokens(LAYERS, range(TOKENS), FROM)
        )
        kept = both.source.read_tokens(LAYERS, range(TOKENS), FROM)
        read = both.source.read
        reads: list[Sequence[Sequence[int]]] = []

        def slow_read(
            chunk: Chunk, block_ids: Sequence[Sequence[int]]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            reads.append(block_ids)
            if len(reads) == 3:
                # the engine takes the blocks, and another request overwrites them
                both.leases.preempt("a")
                noise = torch.randn_like(kept[0], dtype=torch.float32).to(torch.bfloat16)
                both.source.write_tokens(LAYERS, range(TOKENS), FROM, noise, noise)
            return read(chunk, block_ids)

        both.source.read = slow_read  # type: ignore[method-assign]
        request_id = start(both)
        both.begin("a", TOKENS, "x")
        both.advance("a", 64, FROM)
        deadline_s = time.monotonic() + 5
        while len(reads) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(reads) == 3
        both.advance("a", 32, other)
        finish(both, other)
        assert both.outcome(request_id).failure == ""
        assert reads[3] == (other,)
        found = both.target.read_tokens(LAYERS, range(TOKENS), TO)
        assert torch.equal(found[0], kept[0])
        assert torch.equal(found[1], kept[1])


@pytest.mark.parametrize("begun", [True, False], ids=["computing", "waiting"])
def test_aborted_prefill_is_told_at_once(begun: bool) -> None:
    """When the prefill is aborted its consumer computes the request itself, without waiting for any timeout."""
    with pair(timeout_s=30.0) as both:
        request_id = start(both)
        both.begin("a", TOKENS, "x")
        if begun:
            both.advance("a", 32, FROM)
            assert soon(both, LAYERS, range(32))
        both.leases.stop("a")
        outcome = both.outcome(request_id, 2.0)
        assert outcome.failure == "PeerRefused"
        assert "Cancelled" in outcome.detail
        assert len(both.leases) == 0
        # one that comes later learns it as soon
        late = replace(both.load("x", range(TOKENS), TO, transfer=True), request_id="late")
        assert "has ended: Cancelled" in both.fetch(late, 2.0).detail


def test_prefill_that_never_comes() -> None:
    """A consumer whose prefill does not reach the producer is refused after the time of a lease."""
    with pair(lease_s=0.3) as both:
        outcome = both.outcome(start(both), 5.0)
        assert outcome.failure == "PeerRefused"
        assert "no prefill came for transfer 'x'" in outcome.detail


def test_another_prompt_under_the_same_name_is_refused() -> None:
    """The prompt is compared, not only the transfer's name."""
    with pair() as both:
        both.begin("a", TOKENS, "x")
        load = both.load("x", range(TOKENS), TO, transfer=True, prompt_digest="e" * 32)
        outcome = both.fetch(load)
        assert outcome.failure == "PeerRefused"
        assert "RangeMismatch" in outcome.detail
        finish(both)
        assert both.ended() == ({"a"}, {"RangeMismatch": 1})


def test_cancelled_consumer_frees_the_prefill_when_it_ends() -> None:
    """When the consumer goes while its prefill runs, nothing is kept after the prefill's end."""
    with pair() as both:
        request_id = start(both)
        both.begin("a", TOKENS, "x")
        both.advance("a", 32, FROM)
        assert soon(both, LAYERS, range(32))
        both.client.cancel(request_id)
        assert both.outcome(request_id).failure == "Cancelled"
        time.sleep(2.2)
        assert both.leases.take_ended() == (set(), {})
        finish(both)
        ended, counts = both.ended()
        assert ended == {"a"}
        assert counts.keys() <= {"PeerLost", "Cancelled"}


@pytest.mark.parametrize("early", [True, False])
def test_release_by_the_transfers_name(early: bool) -> None:
    """A transfer that is not needed frees its prefill at its end, even if nobody here knew of it yet."""
    with pair() as both:
        if not early:
            both.begin("a", TOKENS, "x")
        both.client.release(both.load("x", range(TOKENS), TO, transfer=True).remote)
        time.sleep(0.3)
        if early:
            both.begin("a", TOKENS, "x")
        finish(both)
        assert both.ended() == ({"a"}, {"Released": 1})


def test_finished_prefill_is_found_by_the_transfers_name() -> None:
    """A consumer that comes after the end gets everything at once."""
    with pair() as both:
        both.begin("a", TOKENS, "x")
        finish(both)
        outcome = both.outcome(start(both))
        assert outcome.failure == ""
        # nothing could be hidden
        assert outcome.exposed_s == outcome.total_s
        assert equal(both, LAYERS, range(TOKENS))
        assert both.ended() == ({"a"}, {"Sent": 1})


def test_a_prefill_of_another_length_is_not_sent() -> None:
    """A prefill that ended with other tokens than were announced fails its transfer."""
    with pair() as both:
        request_id = start(both)
        both.begin("a", TOKENS, "x")
        both.leases.add(
            Lease(
                request_id="a",
                tokens=TOKENS - 1,
                prompt_digest="d" * 32,
                block_ids=(FROM,),
                workload="default",
                model_s=0.5,
            )
        )
        assert both.outcome(request_id).failure == "PeerRefused"
        assert both.ended() == ({"a"}, {"RangeMismatch": 1})


def test_nothing_is_left_after_many() -> None:
    """Fifty early transfers side by side, a tenth of them aborted, leave no prefill and no thread behind."""
    with pair(timeout_s=20.0) as both:
        before = threading.active_count()
        for index in range(50):
            both.client.start(both.load(f"x{index}", range(40), TO, transfer=True))
        for index in range(50):
            both.begin(f"r{index}", 40, f"x{index}")
            both.advance(f"r{index}", 32, FROM)
        for index in range(50):
            if index % 10:
                both.lease(f"r{index}", 40, FROM)
            else:
                both.leases.stop(f"r{index}")
        failures = [both.outcome(f"local-x{index}").failure for index in range(50)]
        assert failures == ["" if index % 10 else "PeerRefused" for index in range(50)]
        deadline_s = time.monotonic() + 5
        while len(both.leases) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert len(both.leases) == 0
        # fifty early threads, as many serving ones at most, and the two that code
        assert threading.active_count() <= before + 102
