"""What is known of a link, and how fast that follows it."""

import contextlib
import socket
import threading
import time
from dataclasses import replace

import pytest

from kvserve_api.latency import Link
from kvserve_connector.links import BURST_BYTES, MAX_LINKS, SCATTER, LinkBook, LinkState
from kvserve_connector.promises import Promise
from kvserve_connector.tcp_account import TcpProgress

MB = 1e6
PRIOR = 125 * MB


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
    first.coded(1 / 3)
    first.coded(1 / 3)
    first.keep(1 / 3)
    known = link.snapshot(PRIOR, book.coders)
    assert known.backlog_bytes == pytest.approx(10 * MB)
    # two threads share the seconds of coding
    assert known.encode_backlog_s == pytest.approx(1.0)
    assert known.decode_backlog_s == pytest.approx(2.5)
    second.withdraw(1 / 2)
    known = link.snapshot(PRIOR, book.coders)
    assert known.backlog_bytes == pytest.approx(7 * MB)
    assert known.encode_backlog_s == pytest.approx(0.625)
    for _ in range(5):
        first.coded(1 / 3)
        first.keep(1 / 3)
    second.end()
    first.end()
    idle = link.snapshot(PRIOR, book.coders)
    assert (idle.backlog_bytes, idle.encode_backlog_s, idle.decode_backlog_s) == (0, 0, 0)


def test_arrivals_of_all_links_load_the_coders() -> None:
    """What each of two links is asked for loads it alone, and both load the coders, which share it."""
    book = LinkBook(codec_threads=2)
    links = [book.link(peer) for peer in ("10.0.0.1", "10.0.0.2")]
    now_s = time.monotonic()
    for _ in range(20):
        for link in links:
            for arrivals in (link.arrivals, book.coders.arrivals):
                arrivals.add(now_s, 1000)
    known = links[0].snapshot(PRIOR, book.coders)
    assert known.load.arrivals_per_s > 1.2
    assert known.encoder_load.arrivals_per_s == pytest.approx(known.load.arrivals_per_s, rel=0.05)
    assert links[0].snapshot(PRIOR).encoder_load.arrivals_per_s == 0


def test_what_is_known_is_a_whole_link() -> None:
    """A look at a link makes one with every field, which stands the checks of a link that is made by them."""
    book = LinkBook(codec_threads=2)
    link = book.link("10.0.0.1")
    for arrivals in (link.arrivals, book.coders.arrivals):
        for _ in range(5):
            arrivals.add(time.monotonic(), 1000)
    link.queue(1000.0, 0.5)
    known = link.snapshot(PRIOR, book.coders, 2.0, 0.75)
    assert known == Link(
        bytes_per_s=PRIOR,
        backlog_bytes=1000.0,
        decode_backlog_s=0.25,
        load=replace(known.load),
        encoder_load=replace(known.encoder_load),
        decode_delays=2.0,
        hidden_s=0.75,
    )
    assert known.load.native_bytes_per_s == pytest.approx(1000 * known.load.arrivals_per_s)


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


class Watched:
    """A link with a connection whose account says what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._progress = TcpProgress(
            acked_bytes=0, min_rtt_us=0, delivery_bytes_per_s=0, sending_us=0, reader_us=0
        )
        monkeypatch.setattr(TcpProgress, "of", lambda _: self._progress)
        self._link = LinkState(lambda: self.now_s)
        self._connection = socket.socket()
        self._connection.close()
        self._link.attach(self._connection)

    def send(self, acked_bytes: int, busy_s: float, wall_s: float = 1.0) -> float:
        """Let bytes be acknowledged after some time, and return what is thought of the link then."""
        self.now_s += wall_s
        last = self._progress
        self._progress = last._replace(
            acked_bytes=last.acked_bytes + acked_bytes,
            sending_us=last.sending_us + round(busy_s * 1e6),
        )
        self._link.sample(self._connection)
        return self._link.snapshot(PRIOR).bytes_per_s


def test_small_transfers_show_that_a_slow_link_became_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 400 kB in less time than the kernel counts raise 20 Mbit/s beyond 200; of 100 kB, nothing does."""
    watched = Watched(monkeypatch)
    assert watched.send(2_500_000, 1.0) < 2.5 * MB
    for _ in range(100):
        assert watched.send(100_000, 0.0) < 2.5 * MB
    assert watched.send(400_000, 0.0) > 25 * MB


@pytest.mark.parametrize("connections", [1, 8])
def test_a_drop_is_seen_by_however_many_wait(
    monkeypatch: pytest.MonkeyPatch, connections: int
) -> None:
    """Eight connections that wait for a link together show its drop from 800 to 80 Mbit/s as soon as one does."""
    progress: dict[object, TcpProgress] = {}
    monkeypatch.setattr(TcpProgress, "of", progress.get)
    now_s = 0.0
    link = LinkState(lambda: now_s)
    waiting = [socket.socket() for _ in range(connections)]
    for each in waiting:
        each.close()
        progress[each] = TcpProgress(0, 0, 0, 0, 0)
        link.attach(each)
    for bytes_per_s in [100 * MB, *[10 * MB] * 6]:
        now_s += 0.05
        for each in waiting:
            last = progress[each]
            progress[each] = last._replace(
                acked_bytes=last.acked_bytes + round(bytes_per_s * 0.05 / connections),
                sending_us=last.sending_us + 50_000,
            )
        link.sample(waiting[0])
    assert link.snapshot(PRIOR).bytes_per_s == pytest.approx(10 * MB, rel=0.1)


def test_looks_at_a_link_that_never_rests_add_no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is waited for all the time has its rate however often it is looked at, also after a drop."""
    watched = Watched(monkeypatch)
    watched.send(10_000_000, 0.1, wall_s=0.1)
    for _ in range(100):
        known = watched.send(60_000, 0.006, wall_s=0.006)
    assert known == pytest.approx(10 * MB, rel=0.1)


def test_chunks_as_fast_as_they_are_coded_show_a_fast_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 135 kB every 42 ms, each as small as a burst, don't pass at 20 Mbit/s: 3 MB of them show that."""
    watched = Watched(monkeypatch)
    assert watched.send(2_500_000, 1.0) < 2.5 * MB
    for _ in range(22):
        known = watched.send(135_000, 0.004, wall_s=0.042)
    assert known > 5 * MB


def test_bursts_of_a_slow_link_leave_it_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 20 Mbit/s that lets 128 KiB pass at once after each pause is not thought faster by a fifth."""
    watched = Watched(monkeypatch)
    known = watched.send(2_500_000, 1.0)
    for _ in range(20):
        watched.send(BURST_BYTES, 0.001, wall_s=0.5)
        for _ in range(8):
            known = watched.send(105_000, 0.042, wall_s=0.042)
            assert 2.0 * MB < known < 3.0 * MB


@pytest.mark.parametrize("chunk_bytes", [60_000, 182_000, 700_000])
def test_what_is_sent_without_pause_shows_the_whole_rate(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Chunks one after the other at 20 Mbit/s are 20 Mbit/s: nothing of it is a burst of a link that never rests."""
    watched = Watched(monkeypatch)
    for _ in range(30):
        busy_s = chunk_bytes / (2.5 * MB)
        known = watched.send(chunk_bytes, busy_s, wall_s=busy_s)
    assert (1 - SCATTER) * 2.5 * MB < known < 1.05 * 2.5 * MB


def test_what_was_contradicted_long_ago_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that was fast, then slow, is thought faster again where small transfers say nothing against it."""
    watched = Watched(monkeypatch)
    assert watched.send(100_000_000, 0.1) > 900 * MB
    for most in (400, 40):
        assert watched.send(25_000_000, 1.0) < most * MB
    for _ in range(200):
        known = watched.send(120_000, 0.004)
    assert known > 500 * MB


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
