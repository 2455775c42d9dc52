"""The fault matrix of docs/connector.md: each fault of a transfer ends by a typed reason, in bounded time.

Faults that other modules hold are named in the table there; here are those of peers that die or freeze, of chunks that
go astray, of disks and memory that are full, and the long run with a tenth of all transfers broken.
"""

import gc
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from frame_proxy import FrameProxy, Mangle
from hostile_proxy import HostileProxy
from kv_loopback import ENGINE, LAYOUT, Pair, make_cache, pair
from kvserve_api.errors import UnavailableError
from kvserve_connector import carriers
from kvserve_connector.protocol import HEADER, HEADER_BYTES, Kind, pack_message
from kvserve_connector.ready import ReadyTable
from kvserve_connector.stores.folder import FolderStore
from kvserve_strategies.artifacts import open_store
from producer_process import BLOCKS, TOKENS, ProducerProcess, producer_process
from random_bundles import write_sample
from tables import table

FROM, TO = BLOCKS, (1, 2, 4, 8, 16)
ALL = range(TOKENS)
LAYERS = range(LAYOUT.layers)


def arrived(both: Pair) -> bool:
    """Tell whether the target holds what a producer of these tests holds."""
    theirs = both.target.read_tokens(LAYERS, ALL, TO)
    ours = make_cache(seed=7).read_tokens(LAYERS, ALL, FROM)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.fixture(scope="module")
def producer() -> Iterator[ProducerProcess]:
    """A producer in a process of its own, for the tests up to the one that kills it."""
    with producer_process() as made:
        yield made


@pytest.mark.slow
def test_a_frozen_producer_is_a_timeout(producer: ProducerProcess) -> None:
    """A producer that is stopped ends a transfer by `stall_s`, before as in the middle of it, and serves on after."""
    with pair(timeout_s=12.0, stall_s=1.5) as both:
        producer.signal(signal.SIGSTOP)
        try:
            started_s = time.monotonic()
            outcome = both.fetch(both.load("r0", ALL, TO, port=producer.port))
            assert outcome.failure == "Timeout"
            assert time.monotonic() - started_s < 4
        finally:
            producer.signal(signal.SIGCONT)
        with HostileProxy(producer.port) as proxy:
            load = both.load("r1", ALL, TO, port=proxy.port)
            both.client.start(load)
            proxy.wait_forwarded(10_000)
            producer.signal(signal.SIGSTOP)
            try:
                outcome = both.outcome(load.request_id, 4.0)
            finally:
                producer.signal(signal.SIGCONT)
            assert outcome.failure == "Timeout"
            assert 10_000 < outcome.wire_bytes < outcome.native_bytes
        assert both.fetch(both.load("r2", ALL, TO, port=producer.port)).failure == ""
        assert arrived(both)


@pytest.mark.slow
def test_a_killed_producer_is_a_lost_peer(producer: ProducerProcess) -> None:
    """A producer that is killed in the middle ends the transfer at once; one that is gone refuses the next at once."""
    with pair(timeout_s=8.0, stall_s=4.0) as both:
        assert both.fetch(both.load("r3", ALL, TO, port=producer.port)).failure == ""
        with HostileProxy(producer.port) as proxy:
            load = both.load("r4", ALL, TO, port=proxy.port)
            both.client.start(load)
            proxy.wait_forwarded(10_000)
            producer.signal(signal.SIGKILL)
            started_s = time.monotonic()
            outcome = both.outcome(load.request_id, 2.0)
            assert outcome.failure == "PeerLost"
            assert 10_000 < outcome.wire_bytes < outcome.native_bytes
        # the kept connection of the first fetch is dead, and nobody listens any more
        outcome = both.fetch(both.load("r5", ALL, TO, port=producer.port))
        assert outcome.failure == "PeerLost"
        assert time.monotonic() - started_s < 2


def test_a_consumer_that_dies_after_the_last_byte_frees_the_blocks() -> None:
    """Without the consumer's DONE the producer's lease ends by what happened, and soon."""
    with pair(timeout_s=3.0, stall_s=0.5) as both:
        both.lease("a", TOKENS, FROM)
        with socket.create_connection(("127.0.0.1", both.server.port), timeout=5) as consumer:
            wish = both.client._wish(both.load("a", ALL, TO), 3.0)
            consumer.sendall(wish.pack())
            size = 2 * LAYOUT.native_bytes(TOKENS) // 3
            while size > 0:
                size -= len(consumer.recv(1 << 16))
        ended, counts = both.ended()
        assert ended == {"a"}
        assert set(counts) <= {"PeerLost", "Timeout"}


def swapped(frames: list[bytes]) -> list[bytes]:
    """Swap the first two chunks."""
    return [frames[1], frames[0], *frames[2:]]


def doubled(frames: list[bytes]) -> list[bytes]:
    """Send the first chunk twice."""
    return [frames[0], *frames]


def lost(frames: list[bytes]) -> list[bytes]:
    """Leave the second chunk out."""
    return [frames[0], *frames[2:]]


def cut(frames: list[bytes]) -> list[bytes]:
    """Leave out the last 100 bytes of the second chunk, and go on as if nothing were."""
    return [frames[0], frames[1][:-100], *frames[2:]]


def exchanged(frames: list[bytes]) -> list[bytes]:
    """Send the first chunk's bytes under the second one's header."""
    return [frames[0], frames[1][:HEADER_BYTES] + frames[0][HEADER_BYTES:], *frames[2:]]


def foreign(frames: list[bytes]) -> list[bytes]:
    """Send chunks that no version has."""
    head = HEADER.pack(b"KVT1", 99, 0, 0, 0)
    return [head, *frames]


@pytest.mark.parametrize(
    ("mangle", "reasons"),
    [
        pytest.param(swapped, {"RangeMismatch"}, id="reordered"),
        pytest.param(doubled, {"RangeMismatch", "TooLarge"}, id="duplicated"),
        pytest.param(lost, {"RangeMismatch", "Malformed"}, id="lost"),
        pytest.param(cut, {"ChecksumMismatch", "BadMagic", "Truncated"}, id="cut"),
        pytest.param(exchanged, {"RangeMismatch"}, id="exchanged"),
        pytest.param(foreign, {"UnsupportedVersion", "ChecksumMismatch"}, id="unknown kind"),
    ],
)
@pytest.mark.parametrize("profile", ["none", "lossless"])
def test_chunks_that_go_astray_are_found(mangle: Mangle, reasons: set[str], profile: str) -> None:
    """Chunks in another order, twice, lost, cut or exchanged are refused by a typed reason, whatever coded them."""
    with pair() as both, FrameProxy(both.server.port, mangle) as proxy:
        both.selector.install(ReadyTable.of(table(pinned=profile)))
        both.lease("a", TOKENS, FROM)
        outcome = both.fetch(both.load("a", ALL, TO, port=proxy.port))
        assert len(proxy.chunks) == 4
        assert outcome.failure in reasons
        assert both.ended()[0] == {"a"}


def test_a_chunk_of_another_transfer_is_found() -> None:
    """A chunk that is replayed from an earlier transfer fits in every other way, and is refused all the same."""
    seen: list[list[bytes]] = []

    def replay(frames: list[bytes]) -> list[bytes]:
        seen.append(frames)
        return [seen[0][0], *frames[1:]] if len(seen) == 2 else frames

    with pair() as both, FrameProxy(both.server.port, replay) as proxy:
        both.lease("a", TOKENS, FROM)
        assert both.fetch(both.load("a", ALL, TO, port=proxy.port)).failure == ""
        both.lease("b", TOKENS, TO)
        outcome = both.fetch(both.load("b", ALL, FROM, port=proxy.port))
        assert len(seen[0][0]) == len(seen[1][0])
        assert outcome.failure == "ChecksumMismatch"
        assert "of another transfer" in outcome.detail


def test_a_slow_link_delivers() -> None:
    """Over 1 Mbit/s a transfer that fits its time arrives whole, and one that does not ends by its time."""
    tokens = range(20)
    need_s = LAYOUT.native_bytes(len(tokens)) / 125_000
    # both ends keep the time, and either may be the first to give up
    for timeout_s, failures in ((5.0, {""}), (0.6 * need_s, {"Timeout", "PeerLost"})):
        with (
            pair(timeout_s=timeout_s, stall_s=min(1.0, timeout_s)) as both,
            HostileProxy(both.server.port, bytes_per_s=125_000) as proxy,
        ):
            both.lease("a", len(tokens), FROM)
            started_s = time.monotonic()
            outcome = both.fetch(both.load("a", tokens, TO, port=proxy.port))
            assert outcome.failure in failures
            assert time.monotonic() - started_s < timeout_s + 0.5


def test_another_protocol_is_refused() -> None:
    """A consumer of another protocol gets no answer, and the prefill stays for one that fits."""
    with pair() as both:
        both.lease("a", TOKENS, FROM)
        with socket.create_connection(("127.0.0.1", both.server.port), timeout=5) as consumer:
            consumer.sendall(pack_message(Kind.PULL, {"protocol": 2}))
            assert consumer.recv(1) == b""
        assert both.fetch(both.load("a", ALL, TO)).failure == ""


def test_no_memory_for_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for a chunk the transfer ends by that, both sides are free, and the next one arrives."""

    def none_left(length: int) -> bytearray:
        raise MemoryError(f"{length} bytes")

    with pair() as both:
        both.lease("a", TOKENS, FROM)
        with monkeypatch.context() as patch:
            patch.setattr(carriers, "bytearray", none_left, raising=False)
            outcome = both.fetch(both.load("a", ALL, TO))
        assert outcome.failure == "OutOfMemory"
        assert both.ended()[0] == {"a"}
        both.lease("b", TOKENS, FROM)
        assert both.fetch(both.load("b", ALL, TO)).failure == ""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_no_bundle_out(
    tiny_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a bundle can't be kept on disk it is used from the store, whole and verified."""
    bundle = write_sample(tmp_path / "bundle", LAYOUT, ENGINE.fingerprint)
    store = open_store((tmp_path / "store").as_uri())
    store.put_bundle(tmp_path / "bundle")
    (tiny_disk / "filler").write_bytes(bytes(60_000))
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tiny_disk))
    assert sum(f.stat().st_size for f in (tmp_path / "bundle").iterdir()) > 4096
    found = store.get_bundle(bundle.digest)
    assert found.digest == bundle.digest
    assert found.basis_keys == bundle.basis_keys


def test_a_full_disk_keeps_prefixes_out(tiny_disk: Path) -> None:
    """A value that does not fit is refused by a typed error and not seen, and what was there before still is."""
    store = FolderStore(tiny_disk / "kv", max_bytes=1 << 30, ttl_s=60.0)
    store.put("aa11", b"x" * 20_000, timeout_s=5.0)
    with pytest.raises(UnavailableError):
        store.put("bb22", b"y" * 60_000, timeout_s=5.0)
    assert store.get("bb22", max_bytes=1 << 20, timeout_s=5.0) is None
    kept = store.get("aa11", max_bytes=1 << 20, timeout_s=5.0)
    assert kept is not None
    assert bytes(kept) == b"x" * 20_000


SOAK = 1_000


@pytest.mark.slow
def test_a_thousand_transfers_with_faults_leave_nothing() -> None:
    """After 1,000 transfers, a tenth of them broken in six ways, nothing is left: no lease, thread, file or memory."""
    with pair(timeout_s=4.0, stall_s=0.4, lease_s=5.0) as both:
        broken = _faults(both)
        order = random.Random(5)
        marks: list[tuple[int, int]] = []
        failures: Counter[str] = Counter()
        # the first hundred fill pools and caches
        for index in range(SOAK):
            if index in (200, SOAK - 1):
                marks.append(_settled(both))
            name = f"r{index}"
            if order.random() < 0.1:
                failures[order.choice(broken)(name)] += 1
                continue
            both.lease(name, 40, FROM)
            failures[both.fetch(both.load(name, range(40), TO)).failure] += 1
            if index % 50 == 0:
                both.leases.take_ended()
        _drain(both)
        assert len(both.leases) == 0
        assert failures[""] > 0.85 * SOAK
        assert set(failures) == {
            "", "PeerLost", "Timeout", "ChecksumMismatch", "PeerRefused", "Cancelled",
        }  # fmt: skip
        assert not both.client._active
        (files, memory), (files_after, memory_after) = marks
        assert files_after <= files + 2
        # kibibytes; the allocator's own coming and going is some megabytes
        assert memory_after - memory < 24_000
        assert threading.active_count() < 40


def _faults(both: Pair) -> list[Callable[[str], str]]:
    """Return ways to break a transfer; each returns the failure."""

    def through(name: str, **harm: float) -> str:
        both.lease(name, 40, FROM)
        with HostileProxy(both.server.port, **harm) as proxy:  # type: ignore[arg-type]
            return both.fetch(both.load(name, range(40), TO, port=proxy.port)).failure

    def cancelled(name: str) -> str:
        both.lease(name, 40, FROM)
        with HostileProxy(both.server.port, freeze_at=9000) as proxy:
            load = both.load(name, range(40), TO, port=proxy.port)
            both.client.start(load)
            proxy.wait_forwarded(1)
            both.client.cancel(load.request_id)
            return both.outcome(load.request_id).failure

    def refused(name: str) -> str:
        both.lease(name, 40, FROM)
        return both.fetch(both.load(name, range(40), TO, prompt_digest="x" * 32)).failure

    def nobody(name: str) -> str:
        return both.fetch(both.load(name, range(40), TO, port=1)).failure

    return [
        lambda name: through(name, cut_at=9000),
        lambda name: through(name, flip_at=9000),
        lambda name: through(name, freeze_at=9000),
        cancelled,
        refused,
        nobody,
    ]


def _drain(both: Pair) -> None:
    """Let leases end, those that nobody claims by their time."""
    deadline_s = time.monotonic() + 8
    while len(both.leases) and time.monotonic() < deadline_s:
        both.leases.take_ended()
        time.sleep(0.05)


def _settled(both: Pair) -> tuple[int, int]:
    """Return open files and resident kibibytes, once what is ending has ended."""
    both.outcomes.clear()
    _drain(both)
    time.sleep(0.6)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * resource.getpagesize() // 1024
