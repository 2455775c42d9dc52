"""The queues that the controller's benchmark replays: by hand, and what no schedule may break."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller_queue import Capacity, Sent, Tandem, Work

CONSTANT = Capacity.of([0], [100.0])
WORKS = st.builds(
    Work,
    encode_s=st.sampled_from([0.0, 0.5, 2.0]),
    wire_bytes=st.floats(1, 1000),
    decode_s=st.sampled_from([0.0, 0.25, 1.0]),
    chunks=st.integers(1, 5),
)
ARRIVALS = st.lists(st.tuples(st.floats(0, 3), WORKS), min_size=1, max_size=12)


def run(capacity: Capacity, arrivals: list[tuple[float, Work]], rtt_s: float = 0.0) -> list[Sent]:
    """Send works, each so long after the one before."""
    tandem, now_s, transfers = Tandem(capacity, rtt_s), 0.0, []
    for gap_s, work in arrivals:
        now_s += gap_s
        transfers.append(tandem.send(now_s, work))
    tandem.finish()
    return transfers


def test_one_transfer_by_hand() -> None:
    """Two chunks overlap: encoded at 1 and 2 s, sent by 2 and 3 s, decoded by 2.5 and 3.5 s, and a round trip later."""
    (sent,) = run(CONSTANT, [(0.0, Work(2.0, 200.0, 1.0, 2))], rtt_s=0.25)
    assert sent.link == [(1.0, 1.0, 2.0), (2.0, 2.0, 3.0)]
    assert sent.total_s == 3.75


def test_raw_transfer_passes_the_coder_by() -> None:
    """What needs no encoding reaches the link at once, and is served before chunks that are still being encoded."""
    first, second = run(
        CONSTANT, [(0.0, Work(2.0, 200.0, 1.0, 2)), (0.5, Work(0.0, 100.0, 0.0, 1))]
    )
    assert second.link == [(0.5, 0.5, 1.5)]
    assert first.link == [(1.0, 1.5, 2.5), (2.0, 2.5, 3.5)]
    assert (first.done_s, second.done_s) == (4.0, 1.5)


def test_coder_serves_in_order() -> None:
    """A second transfer is encoded after the first: at 4 s, while the link has long been idle."""
    _, second = run(CONSTANT, [(0.0, Work(2.0, 10.0, 0.0, 1)), (0.5, Work(2.0, 10.0, 0.0, 1))])
    assert second.link == [(4.0, 4.0, 4.1)]
    assert second.total_s == pytest.approx(3.6)


def test_capacity_moves() -> None:
    """A link of 100 bytes/s for 2 s, then 10: 250 bytes from 1 s on take 1 s and 15 s more."""
    capacity = Capacity.of([0, 2], [100, 10])
    assert capacity.finish_s(1.0, 250.0) == 17.0
    assert capacity.finish_s(1.0, 100.0) == 2.0
    assert (capacity.at(1.9), capacity.at(2.0), capacity.at(9.0)) == (100.0, 10.0, 10.0)
    assert capacity.bytes_between(1.0, 4.0) == 120.0


@given(ARRIVALS)
def test_bytes_and_time_are_conserved(arrivals: list[tuple[float, Work]]) -> None:
    """The link serves one chunk at a time, at its rate, in the order they reach it, and idles only when none waits."""
    capacity = Capacity.of([0, 1, 2.5], [100, 20, 400])
    transfers = run(capacity, arrivals)
    served = sorted(
        (start_s, end_s, reached_s, sent.work.wire_bytes / sent.work.chunks)
        for sent in transfers
        for reached_s, start_s, end_s in sent.link
    )
    assert len(served) == sum(work.chunks for _, work in arrivals)
    free_s = 0.0
    for start_s, end_s, reached_s, nbytes in served:
        assert start_s == max(free_s, reached_s)
        assert math.isclose(capacity.bytes_between(start_s, end_s), nbytes, rel_tol=1e-6)
        free_s = end_s
    assert [reached for _, _, reached, _ in served] == sorted(r for _, _, r, _ in served)


@given(ARRIVALS)
def test_preview_is_what_happens(arrivals: list[tuple[float, Work]]) -> None:
    """What is foreseen of a transfer comes true if none comes after it."""
    capacity = Capacity.of([0, 1, 2.5], [100, 20, 400])
    tandem, now_s = Tandem(capacity, 0.1), 0.0
    for gap_s, work in arrivals[:-1]:
        now_s += gap_s
        tandem.send(now_s, work)
    gap_s, last = arrivals[-1]
    tandem.advance(now_s + gap_s)
    foreseen_s = tandem.preview_s(now_s + gap_s, last)
    sent = tandem.send(now_s + gap_s, last)
    tandem.finish()
    assert math.isclose(sent.total_s, foreseen_s, rel_tol=1e-9)
