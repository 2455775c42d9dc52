"""How a producer finds out that a link has recovered which what it sends leaves idle."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_loopback import Pair, pair
from kvserve_api.errors import KVServeError
from kvserve_connector.frames import FrameSocket
from kvserve_connector.goodput import Goodput
from kvserve_connector.links import PROBE_EVERY_S, UNSURE_S, LinkState
from kvserve_connector.probing import PROBE_BYTES, send_padding, take_padding
from kvserve_connector.protocol import Kind, pack_header
from kvserve_connector.ready import ReadyTable
from tables import candidate, table

BLOCKS = (3, 9, 5, 20, 11), (1, 2, 4, 8, 16)
SLOW_BYTES_PER_S = 1e6
PEER = "127.0.0.1"


def fetch(both: Pair, name: str) -> str:
    """Do a small transfer and return what coded it."""
    both.lease(name, 80, BLOCKS[0])
    outcome = both.fetch(both.load(name, range(80), BLOCKS[1]))
    assert outcome.failure == ""
    assert outcome.accept is not None
    return outcome.accept.profile


def believe_slow(both: Pair) -> LinkState:
    """Make the producer take its link for slow, and choose by that."""
    names = ("none", "int4-token")
    codecs = {name: candidate(name, bytes_per_s=1e7) for name in names}
    both.selector.install(ReadyTable.of(table(*names, candidates=codecs)))
    link = both.links.link(PEER)
    link._goodput = Goodput(bytes_per_s=SLOW_BYTES_PER_S, shown_bytes_per_s=SLOW_BYTES_PER_S)
    link._told_s -= UNSURE_S
    return link


def test_a_recovered_link_is_found_out() -> None:
    """A link that is taken for slow but is not: small transfers go by that until a probe has shown what it is."""
    with pair() as both:
        link = believe_slow(both)
        chosen = [fetch(both, "first")]
        assert chosen == ["int4-token"]
        # where the machine is busy, one probe may show less than there is
        while chosen[-1] != "none" and len(chosen) < 10:
            time.sleep(1.2 * PROBE_EVERY_S)
            chosen.append(fetch(both, f"r{len(chosen)}"))
        assert chosen[-1] == "none"
        assert link.snapshot(1.0).bytes_per_s > 5 * SLOW_BYTES_PER_S
        assert both.metrics.take_totals()["probes"]["send"] > 0


@pytest.mark.parametrize("why", ["no share", "the same profile", "pinned"])
def test_no_probe_that_nothing_comes_of(why: str) -> None:
    """Nothing is sent where probes get no time, or where a faster link would get the same profile."""
    with pair(probe_share=0.0 if why == "no share" else 0.02) as both:
        link = believe_slow(both)
        if why == "the same profile":
            fast = {name: candidate(name, bytes_per_s=1e12) for name in ("none", "int4-token")}
            both.selector.install(ReadyTable.of(table(*fast, candidates=fast)))
        elif why == "pinned":
            both.selector.install(ReadyTable.of(table("none", "int4-token", pinned="int4-token")))
        assert fetch(both, "first") == "int4-token"
        assert not link.begin_probe()
        assert "probes" not in both.metrics.take_totals()
        assert link.snapshot(1.0).bytes_per_s == SLOW_BYTES_PER_S


@pytest.fixture
def ends() -> Iterator[tuple[FrameSocket, FrameSocket]]:
    """Producer's and consumer's end of a connection."""
    with socket.create_server((PEER, 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    both = FrameSocket(ours, 1.0), FrameSocket(theirs, 1.0)
    yield both
    for each in both:
        each.close()


def answer(producer: FrameSocket, link: LinkState) -> int:
    """Read PROBE, and answer it."""
    assert producer.receive_header().kind is Kind.PROBE
    return send_padding(producer, link)


@pytest.mark.parametrize(
    ("wished", "backlog_bytes", "expected"),
    [(True, 0, PROBE_BYTES), (False, 0, 0), (True, 1 << 20, 0)],
    ids=["wished", "unasked", "a transfer wants the link"],
)
def test_a_probe_is_bounded(
    ends: tuple[FrameSocket, FrameSocket], wished: bool, backlog_bytes: int, expected: int
) -> None:
    """Who asks gets a bounded number of bytes once, and none unless that was wished for and the link rests."""
    producer, consumer = ends
    link = LinkState()
    link.queue(backlog_bytes)
    if wished:
        link.wish_probe()
    with ThreadPoolExecutor(1) as threads:
        for most in (expected, 0):
            sent = threads.submit(answer, producer, link)
            assert take_padding(consumer) == sent.result() == most


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (pack_header(Kind.CHUNK, 100), "Malformed"),
        (pack_header(Kind.PADDING, 1 << 30), "TooLarge"),
        ((pack_header(Kind.PADDING, 1 << 16) + bytes(1 << 16)) * 17, "TooLarge"),
        (b"", "Timeout"),
    ],
    ids=["another frame", "a large frame", "without end", "silence"],
)
def test_a_hostile_producer_wastes_little(
    ends: tuple[FrameSocket, FrameSocket], sent: bytes, reason: str
) -> None:
    """What is no probe, or more than one, or nothing, ends it with an error within its time."""
    producer, consumer = ends
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(producer.send, sent)
        with pytest.raises(KVServeError) as caught:
            take_padding(consumer)
        consumer.close()
        done.exception()
    assert caught.value.reason == reason


def test_probes_get_a_share_of_the_time() -> None:
    """A link is probed only after it has said nothing for a while, and after a long probe only much later."""
    now_s = 100.0
    link = LinkState(lambda: now_s, probe_share=0.02)
    assert not link.unsure
    now_s += 10
    # of a link of which nothing is known there is nothing to doubt
    assert not link.unsure
    link.observe(50 << 20, 10.0)
    assert not link.unsure
    now_s += 1.1 * UNSURE_S
    assert link.unsure
    link.wish_probe()
    assert not link.unsure
    now_s += 1.1 * PROBE_EVERY_S
    assert link.unsure
    assert link.begin_probe()
    link.end_probe(0.1)
    now_s += 4.9
    assert not link.unsure
    now_s += 0.2
    assert link.unsure
    link.queue(1000)
    assert not link.unsure
