"""What is known of a link, and how fast that follows it."""

import contextlib
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_connector.links import (
    BURST_BYTES,
    MAX_LINKS,
    LinkBook,
    LinkState,
    Promise,
    TcpProgress,
    blend,
)

MB = 1e6
PRIOR = 125 * MB


def test_first_sample_counts_whole() -> None:
    """The first sample is the estimate, without what may have been a burst."""
    acked = 10 * MB
    assert blend(None, acked, BURST_BYTES, 1.0) == acked - BURST_BYTES


def test_drop_is_followed_within_two_samples() -> None:
    """After a drop from 1 Gbit/s to 50 Mbit/s the second sample comes within a factor of 2.5."""
    estimate: float | None = 125 * MB
    for _ in range(2):
        estimate = blend(estimate, 6.25 * MB, BURST_BYTES, 1.0)
    assert estimate is not None
    assert 6.25 * MB <= estimate < 2.9 * 6.25 * MB
    assert blend(estimate, 6.25 * MB, BURST_BYTES, 1.0) < 1.6 * 6.25 * MB  # type: ignore[operator]


def test_recovery_is_followed_within_two_samples() -> None:
    """After a recovery two samples make at least 70 % of the way up."""
    estimate: float | None = 6.25 * MB
    for _ in range(2):
        estimate = blend(estimate, 12.5 * MB, BURST_BYTES, 0.1)
    assert estimate is not None
    assert estimate > 0.7 * 125 * MB


def test_bursts_do_not_look_like_a_fast_link() -> None:
    """Chunks that pass at once after a pause say nothing about a faster link."""
    slow = 25 * MB
    assert blend(slow, 6 * BURST_BYTES, 6 * BURST_BYTES, 0.001) == slow


@given(
    estimate=st.none() | st.floats(1e3, 1e12),
    acked=st.floats(0, 1e13),
    burst=st.floats(0, 1e13),
    busy_s=st.floats(0, 1e6),
)
def test_estimates_stay_bounded(
    estimate: float | None, acked: float, burst: float, busy_s: float
) -> None:
    """Whatever a sample says, the estimate is finite, positive, and between old and sample."""
    new = blend(estimate, acked, burst, busy_s)
    assert new is None or 1e3 <= new <= 1e12
    if new is not None and estimate is not None and busy_s > 0:
        low, high = sorted((estimate, min(max(acked / busy_s, 1e3), 1e12)))
        assert low * 0.999 <= new <= high * 1.001


def test_backlog_adds_up_and_empties() -> None:
    """Promised bytes stand ahead of the next transfer until they are taken back."""
    link = LinkState()
    link.queue(5 * MB)
    link.queue(2 * MB)
    assert link.snapshot(PRIOR).backlog_bytes == 7 * MB
    link.queue(-5 * MB)
    link.queue(-2 * MB)
    assert link.snapshot(PRIOR).backlog_bytes == 0
    assert link.snapshot(PRIOR).bytes_per_s == PRIOR


def test_promise_is_kept_chunk_by_chunk() -> None:
    """A transfer stands ahead of the next with what is not done of it, on the link, the coders and the consumer."""
    book = LinkBook(codec_threads=2)
    link = book.link("10.0.0.1")
    first, second = (
        Promise(link=link, coders=book.coders, wire_bytes=6 * MB, encode_s=1.5, decode_s=3.0)
        for _ in range(2)
    )
    first.make()
    second.make()
    first.keep(1 / 3)
    known = link.snapshot(PRIOR, book.coders)
    assert known.backlog_bytes == pytest.approx(10 * MB)
    # two threads share the seconds of coding
    assert known.encode_backlog_s == pytest.approx(1.25)
    assert known.decode_backlog_s == pytest.approx(2.5)
    for _ in range(5):
        first.keep(1 / 3)
    second.end()
    first.end()
    idle = link.snapshot(PRIOR, book.coders)
    assert (idle.backlog_bytes, idle.encode_backlog_s, idle.decode_backlog_s) == (0, 0, 0)


def test_arrivals_of_all_links_load_the_coders() -> None:
    """What each of two links is asked for loads it alone, and both load the coders, which share it."""
    book = LinkBook(codec_threads=2)
    links = [book.link(peer) for peer in ("10.0.0.1", "10.0.0.2")]
    for _ in range(20):
        for link in links:
            for arrivals in (link.arrivals, book.coders.arrivals):
                arrivals.add(time.monotonic(), 1000)
    known = links[0].snapshot(PRIOR, book.coders)
    assert known.load.arrivals_per_s > 1.2
    assert known.encoder_load.arrivals_per_s == pytest.approx(known.load.arrivals_per_s, rel=0.05)
    assert links[0].snapshot(PRIOR).encoder_load.arrivals_per_s == 0


def test_links_are_bounded_and_kept_apart() -> None:
    """Two peers have two links; the least recently used one goes when there are too many."""
    book = LinkBook()
    first = book.link("10.0.0.1")
    first.queue(MB)
    assert book.link("10.0.0.1") is first
    assert book.link("10.0.0.2") is not first
    for index in range(MAX_LINKS):
        book.link(f"peer-{index}")
    assert book.link("10.0.0.1") is not first


@pytest.fixture
def connection() -> "tuple[socket.socket, socket.socket]":
    """A TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


def test_kernel_counts_acknowledged_bytes(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    """The kernel's account of a connection grows by exactly what was sent and read."""
    client, server = connection
    with client, server:
        before = TcpProgress.of(client)
        assert before is not None
        reader = threading.Thread(target=lambda: server.recv(3_000_000, socket.MSG_WAITALL))
        reader.start()
        client.sendall(b"x" * 3_000_000)
        reader.join(10)
        server.sendall(b"y")
        client.recv(1)
        after = TcpProgress.of(client)
        assert after is not None
        assert after.acked_bytes - before.acked_bytes == 3_000_000
        assert after.delivery_bytes_per_s > 0
        assert 0 <= after.min_rtt_s < 1


def test_slow_reader_is_not_a_slow_link(connection: tuple[socket.socket, socket.socket]) -> None:
    """Time in which the receiver took nothing does not count as time of the link."""
    client, server = connection
    with client, server:
        link = LinkState()
        link.attach(client)
        client.settimeout(0.4)
        sent = 0
        # nobody reads: the sockets fill, and then 0.4 s pass
        with contextlib.suppress(TimeoutError):
            while True:
                sent += client.send(b"x" * (1 << 18))
        left = sent
        while left:
            left -= len(server.recv(min(left, 1 << 20)))
        server.sendall(b"y")
        client.recv(1)
        link.detach(client)
        assert link.snapshot(PRIOR).bytes_per_s > 2 * sent / 0.4
