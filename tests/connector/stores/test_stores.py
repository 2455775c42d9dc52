"""Every kind of store does the same, and what goes wrong with one has a type."""

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import obstore
import pytest

from kvserve_api.errors import (
    KVServeError,
    SpecError,
    TransferError,
    UnavailableError,
    WireError,
    WireReason,
)
from kvserve_connector.stores.folder import FolderStore
from kvserve_connector.stores.objects import HEADS
from kvserve_connector.stores.store import GuardedStore
from kvserve_connector.stores.url import open_kv_store
from store_kinds import CLOCKED, KINDS, TTL_S, Clock

KIND = pytest.mark.parametrize("kind", KINDS)
SOON = 5.0


@KIND
def test_what_was_put_is_there(kind: str, tmp_path: Path) -> None:
    """A value comes back as it was put last, until it is deleted; what was never put is not there."""
    store = KINDS[kind](tmp_path, Clock())
    assert store.get("a/b-1", max_bytes=10, timeout_s=SOON) is None
    store.put("a/b-1", b"first", timeout_s=SOON)
    store.put("a/b-1", memoryview(b"second"), timeout_s=SOON)
    store.put("a/b-2", b"", timeout_s=SOON)
    assert store.get("a/b-1", max_bytes=10, timeout_s=SOON) == bytearray(b"second")
    assert store.get("a/b-2", max_bytes=0, timeout_s=SOON) == bytearray(b"")
    asked = ["a/b-1", "a/b-2", "a/b-3", "a/c"]
    assert store.exists(asked, timeout_s=SOON) == {"a/b-1", "a/b-2"}
    store.delete("a/b-1", timeout_s=SOON)
    store.delete("a/b-1", timeout_s=SOON)
    assert store.exists(asked, timeout_s=SOON) == {"a/b-2"}


@pytest.mark.parametrize("kind", CLOCKED)
def test_values_expire(kind: str, tmp_path: Path) -> None:
    """After its time to live a value is gone, however often it was read."""
    clock = Clock()
    store = KINDS[kind](tmp_path, clock)
    store.put("a", b"x", timeout_s=SOON)
    clock.ahead_s = TTL_S - 10
    assert store.get("a", max_bytes=1, timeout_s=SOON) == bytearray(b"x")
    clock.ahead_s = TTL_S + 10
    assert store.exists(["a"], timeout_s=SOON) == frozenset()
    assert store.get("a", max_bytes=1, timeout_s=SOON) is None
    clock.ahead_s = 0
    assert store.get("a", max_bytes=1, timeout_s=SOON) is None


@KIND
def test_too_much_is_not_read(kind: str, tmp_path: Path) -> None:
    """A value beyond the bound is refused."""
    store = KINDS[kind](tmp_path, Clock())
    store.put("a", bytes(1000), timeout_s=SOON)
    with pytest.raises(WireError) as caught:
        store.get("a", max_bytes=999, timeout_s=SOON)
    assert caught.value.reason == WireReason.TOO_LARGE


@KIND
def test_time_that_is_over_ends_it(kind: str, tmp_path: Path) -> None:
    """Without time left nothing is read or written."""
    store = KINDS[kind](tmp_path, Clock())
    store.put("a", b"x", timeout_s=SOON)
    for late in (
        lambda: store.get("a", max_bytes=1, timeout_s=0),
        lambda: store.put("b", b"x", timeout_s=0),
        lambda: store.exists(["a"], timeout_s=0),
    ):
        with pytest.raises(TransferError, match="Timeout"):
            late()
    assert store.exists(["a", "b"], timeout_s=SOON) == {"a"}


@KIND
def test_writers_of_one_value(kind: str, tmp_path: Path) -> None:
    """Many writers and readers of one key: a reader sees one writer's value whole."""
    store = KINDS[kind](tmp_path, Clock())
    seen: set[bytes] = set()

    def write(number: int) -> None:
        for _ in range(10):
            store.put("a", bytes([number]) * 20_000, timeout_s=SOON)
            seen.add(bytes(store.get("a", max_bytes=20_000, timeout_s=SOON) or b""))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= {bytes([number]) * 20_000 for number in range(4)}


def test_a_bucket_is_asked_for_many_keys_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many questions are under way at once, all are answered, and together they take no longer than they may."""
    store = KINDS["memory"](tmp_path, Clock())
    keys = [f"many/{number}" for number in range(2 * HEADS)]
    for key in keys[::3]:
        store.put(key, b"x", timeout_s=SOON)
    under_way: list[int] = [0]
    head = obstore.head_async

    async def slow(client: Any, key: str) -> Any:
        under_way.append(under_way[-1] + 1)
        await asyncio.sleep(0.02)
        under_way.append(under_way[-1] - 1)
        return await head(client, key)

    monkeypatch.setattr(obstore, "head_async", slow)
    assert store.exists(keys, timeout_s=SOON) == set(keys[::3])
    assert max(under_way) == HEADS
    with pytest.raises(TransferError, match="Timeout"):
        store.exists(keys, timeout_s=0.01)


def folder(path: Path, max_bytes: int = 1 << 20, clock: Clock | None = None) -> FolderStore:
    """Return a folder store."""
    return FolderStore(path, max_bytes=max_bytes, ttl_s=TTL_S, now_s=clock or Clock())


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    """Beyond its limit a folder gives up what was used longest ago, and stays below."""
    clock = Clock()
    store = folder(tmp_path, 10_000, clock)
    for number in range(9):
        clock.ahead_s += 1
        store.put(f"k/{number}", bytes(1000), timeout_s=SOON)
    clock.ahead_s += 1
    assert store.get("k/0", max_bytes=1000, timeout_s=SOON) is not None
    clock.ahead_s += 1
    store.put("k/9", bytes(2000), timeout_s=SOON)
    keys = [f"k/{number}" for number in range(10)]
    assert {"k/0", "k/9", "k/8"} <= store.exists(keys, timeout_s=SOON)
    assert "k/1" not in store.exists(keys, timeout_s=SOON)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= 10_000


def test_what_has_expired_goes_first(tmp_path: Path) -> None:
    """Room is made of what has expired, though it was read lately."""
    clock = Clock()
    store = folder(tmp_path, 3000, clock)
    store.put("old", bytes(1000), timeout_s=SOON)
    clock.ahead_s = TTL_S - 1
    store.put("new", bytes(1000), timeout_s=SOON)
    store.get("old", max_bytes=1000, timeout_s=SOON)
    clock.ahead_s = TTL_S + 1
    store.put("next", bytes(1500), timeout_s=SOON)
    assert store.exists(["old", "new", "next"], timeout_s=SOON) == {"new", "next"}


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """A store counts what another one has written into the same folder."""
    clock = Clock()
    first, second = (folder(tmp_path, 16_000, clock) for _ in range(2))
    for number in range(40):
        clock.ahead_s += 1
        (first, second)[number % 2].put(f"k/{number}", bytes(1000), timeout_s=SOON)
    total = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert total <= 16_000 * (1 + 2 / 16)
    assert first.exists(["k/39", "k/38"], timeout_s=SOON) == {"k/39", "k/38"}


def test_unfinished_files_are_never_seen(tmp_path: Path) -> None:
    """What a writer left that died is no value, and is removed after a while."""
    clock = Clock()
    store = folder(tmp_path, clock=clock)
    store.put("a/b", b"x", timeout_s=SOON)
    left = tmp_path / "a" / "c.0123.part"
    left.write_bytes(b"half")
    assert store.exists(["a/b", "a/c"], timeout_s=SOON) == {"a/b"}
    clock.ahead_s = 601
    folder(tmp_path, clock=clock).put("a/d", b"y", timeout_s=SOON)
    assert not left.exists()


@pytest.mark.parametrize("key", ["../a", "/a", "a//b", "a/.b", "a b", "", "ä", "a\0"])
def test_keys_can_not_leave_the_folder(key: str, tmp_path: Path) -> None:
    """A key that is no path of plain names is refused."""
    with pytest.raises(SpecError, match="letters, digits"):
        folder(tmp_path).put(key, b"x", timeout_s=SOON)


def test_a_broken_folder_is_unavailable(tmp_path: Path) -> None:
    """A folder that can't be written, and a value that never fits, are said so; nothing half is left."""
    (tmp_path / "kv").write_text("a file where the folder should be")
    with pytest.raises(UnavailableError):
        folder(tmp_path / "kv").put("a", b"x", timeout_s=SOON)
    with pytest.raises(UnavailableError, match="do not fit"):
        folder(tmp_path / "new", 10).put("a", bytes(11), timeout_s=SOON)
    assert os.listdir(tmp_path) == ["kv"]


class Broken:
    """A store that does not answer, and counts how often it was asked."""

    asked = 0

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """Fail, unless it was mended."""
        self.asked += 1
        if key == "mended":
            return bytearray(b"x")
        raise UnavailableError("gone")

    def put(self, key: str, value: object, *, timeout_s: float) -> None:
        """Do nothing."""

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """Find nothing."""
        return frozenset()

    def delete(self, key: str, *, timeout_s: float) -> None:
        """Do nothing."""


def test_a_store_that_is_down_is_left_alone() -> None:
    """After a failure it is asked again only when a pause is over, which grows; every outcome is counted."""
    inner = Broken()
    clock = [0.0]
    store = GuardedStore(inner, now_s=lambda: clock[0])

    def get(key: str) -> None:
        store.get(key, max_bytes=1, timeout_s=SOON)

    asked = []
    for clock[0] in (0.0, 0.4, 0.6, 1.5, 1.7, 3.0):
        with pytest.raises(KVServeError):
            get("a")
        asked.append(inner.asked)
    assert asked == [1, 1, 2, 2, 3, 3]
    clock[0] = 4.0
    get("mended")
    assert store.take_counts() == {("get", "Unavailable"): 6, ("get", "Hit"): 1}
    assert store.take_counts() == {}


def test_urls_of_stores(tmp_path: Path) -> None:
    """A folder's URL and memory's open stores that work; another is refused with what would be right."""
    limits = {"max_bytes": 1000, "ttl_s": TTL_S, "timeout_s": SOON}
    for url in (f"{tmp_path.as_uri()}/kv%20store", "memory:///"):
        store = open_kv_store(url, **limits)  # type: ignore[arg-type]
        store.put("a", b"x", timeout_s=SOON)
        assert store.get("a", max_bytes=1, timeout_s=SOON) == bytearray(b"x")
    assert (tmp_path / "kv store" / "a").read_bytes() == b"x"
    for url, text in (
        ("https://host/x", "must begin with"),
        ("file://host/x", "file:///folder"),
        ("s3://key:secret@bucket", "credentials"),
        ("redis://:secret@host", "credentials"),
        ("redis://host:port", "redis://host:port/number"),
        ("redis:///0", "redis://host:port/number"),
        ("rediss://host/name", "rediss://host:port/number"),
    ):
        with pytest.raises(SpecError, match=text):
            open_kv_store(url, **limits)  # type: ignore[arg-type]


def test_a_server_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket whose server refuses connections is said to be unavailable, within the time of a request."""
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_kv_store("s3://bucket/kv", max_bytes=1000, ttl_s=TTL_S, timeout_s=1.0)
    started_s = time.monotonic()
    with pytest.raises(UnavailableError):
        store.get("a", max_bytes=1, timeout_s=SOON)
    with pytest.raises(UnavailableError, match="did not answer lately"):
        store.exists(["a"], timeout_s=SOON)
    assert time.monotonic() - started_s < 3
