"""The queues that the benchmark of quality replays: by hand, and what no schedule may break."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller_queue import Capacity, Sent, Work
from controller_way import Passing, Way
from kvserve_connector.encoder import AHEAD

CONSTANT = Capacity.of([0], [100.0])
WORKS = st.builds(
    Work,
    encode_s=st.sampled_from([0.0, 0.5, 2.0]),
    wire_bytes=st.floats(1, 1000),
    decode_s=st.sampled_from([0.0, 0.25, 1.0]),
    chunks=st.integers(1, 5),
)
ARRIVALS = st.lists(st.tuples(st.floats(0, 3), WORKS), min_size=1, max_size=8)


class Recorder:
    """Writes down when chunks begin, are coded and go, and has those from a place on be another work."""

    def __init__(self, place: int = 99, work: Work | None = None) -> None:
        self.seen: list[tuple[str, int, int, float]] = []
        self._place = place
        self._work = work

    def begins(self, passing: Passing, now_s: float) -> None:
        """Write down."""
        self.seen.append(("begins", passing.index, passing.begun, now_s))
        if self._work is not None and passing.begun == self._place:
            passing.name, passing.work = "other", self._work

    def coded(self, passing: Passing, now_s: float) -> None:
        """Write down."""
        self.seen.append(("coded", passing.index, len(passing.sizes), now_s))

    def went(self, passing: Passing, now_s: float) -> None:
        """Write down."""
        self.seen.append(("went", passing.index, passing.gone, now_s))


def passing(index: int, at_s: float, work: Work) -> Passing:
    """Return a transfer that is about to begin."""
    return Passing(index, Sent(at_s, Work(0.0, 0.0, 0.0, work.chunks)), work, "one")


def run(
    capacity: Capacity, arrivals: list[tuple[float, Work]], watcher: Recorder | None = None
) -> list[Passing]:
    """Send works, each so long after the one before."""
    way, now_s, transfers = Way(capacity, 0.0, watcher), 0.0, []
    for index, (gap_s, work) in enumerate(arrivals):
        now_s += gap_s
        way.advance(now_s)
        transfers.append(passing(index, now_s, work))
        way.send(transfers[-1])
    way.finish()
    return transfers


def test_one_transfer_by_hand() -> None:
    """Of four raw chunks of a second each the third begins when the first has gone."""
    recorder = Recorder()
    (one,) = run(CONSTANT, [(0.0, Work(0.0, 400.0, 0.5 * 4, 4))], recorder)
    assert [entry[3] for entry in recorder.seen if entry[0] == "begins"] == [0.0, 0.0, 1.0, 2.0]
    assert one.sent.total_s == 4.5
    assert one.sent.link == [(0.0, 0.0, 1.0), (0.0, 1.0, 2.0), (1.0, 2.0, 3.0), (2.0, 3.0, 4.0)]


def test_chunks_are_coded_before_they_go() -> None:
    """Two chunks are coded one after the other, and wait for the link; the third begins when the first has gone."""
    recorder = Recorder()
    run(CONSTANT, [(0.0, Work(0.5 * 3, 300.0, 0.0, 3))], recorder)
    coded = [entry[2:] for entry in recorder.seen if entry[0] == "coded"]
    went = [entry[2:] for entry in recorder.seen if entry[0] == "went"]
    assert coded == [(0, 0.5), (1, 1.0), (2, 2.0)]
    assert went == [(1, 1.5), (2, 2.5), (3, 3.5)]


def test_a_change_by_hand() -> None:
    """Chunks that begin after a change are smaller; what was begun before is sent as it was."""
    recorder = Recorder(2, Work(0.0, 40.0, 0.0, 4))
    (one,) = run(CONSTANT, [(0.0, Work(0.0, 400.0, 0.0, 4))], recorder)
    assert one.names == ["one", "one", "other", "other"]
    assert one.sizes == [100.0, 100.0, 10.0, 10.0]
    assert one.sent.total_s == pytest.approx(2.2)
    assert one.sent.work == Work(0.0, 220.0, 0.0, 4)


@given(ARRIVALS)
def test_no_schedule_breaks_the_rules(arrivals: list[tuple[float, Work]]) -> None:
    """The link serves chunks one at a time, and few of a transfer are begun and not sent."""
    recorder = Recorder()
    transfers = run(CONSTANT, arrivals, recorder)
    served = sorted((start_s, end_s) for one in transfers for _, start_s, end_s in one.sent.link)
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(served))
    for one in transfers:
        assert len(one.sent.link) == one.work.chunks
        assert one.sent.total_s >= one.work.wire_bytes / 100 - 1e-6
    under_way = dict.fromkeys(range(len(transfers)), 0)
    for what, index, _, _ in recorder.seen:
        under_way[index] += {"begins": 1, "coded": 0, "went": -1}[what]
        assert 0 <= under_way[index] <= AHEAD


@given(ARRIVALS, WORKS)
def test_preview_is_what_comes(arrivals: list[tuple[float, Work]], work: Work) -> None:
    """What a last transfer was foreseen to take is what it takes, and asking changed nothing."""
    way, now_s = Way(CONSTANT, 0.25), 0.0
    for index, (gap_s, each) in enumerate(arrivals):
        now_s += gap_s
        way.advance(now_s)
        way.send(passing(index, now_s, each))
    foreseen_s = way.preview_s(now_s, work)
    assert way.preview_s(now_s, work) == foreseen_s
    last = passing(-1, now_s, work)
    way.send(last)
    way.finish()
    assert last.sent.total_s == pytest.approx(foreseen_s)
