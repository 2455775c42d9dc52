"""A real Redis server, and one that lies."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis

from hostile_proxy import HostileProxy
from kvserve_api.errors import TransferError, TransferReason, UnavailableError
from kvserve_api.names import ENV_STORE_PASSWORD
from kvserve_connector.stores.redis import PIECE_BYTES, RedisStore
from kvserve_connector.stores.url import open_kv_store
from store_servers import PASSWORD, redis_port, start_redis

SOON = 5.0
LARGE = PIECE_BYTES * 2 + 17


def store_at(port: int, *, ttl_s: float = 100, timeout_s: float = SOON) -> RedisStore:
    """Return the store in a server's last database."""
    return RedisStore(f"redis://127.0.0.1:{port}/999", ttl_s=ttl_s, timeout_s=timeout_s)


def fill(store: RedisStore, nbytes: int) -> None:
    """Put values of a mebibyte."""
    for number in range(nbytes >> 20):
        store.put(f"big/{number}", bytes(1 << 20), timeout_s=SOON)


def get(store: RedisStore, key: str = "a") -> bytearray | None:
    """Read a value of any size."""
    return store.get(key, max_bytes=LARGE, timeout_s=SOON)


def test_values_expire_by_the_server() -> None:
    """The server forgets a value after its time to live."""
    store = store_at(redis_port(), ttl_s=0.2)
    store.put("short", b"x", timeout_s=SOON)
    assert get(store, "short") == bytearray(b"x")
    time.sleep(0.25)
    assert get(store, "short") is None
    assert store.exists(["short"], timeout_s=SOON) == frozenset()


def test_large_values_come_in_pieces() -> None:
    """A value of several pieces comes back whole."""
    store = store_at(redis_port())
    value = bytes(range(251)) * (LARGE // 251) + bytes(LARGE % 251)
    store.put("large", value, timeout_s=SOON)
    assert get(store, "large") == bytearray(value)


def test_many_keys_are_looked_for_at_once() -> None:
    """Thousands of keys are looked for in a few round trips."""
    store = store_at(redis_port())
    keys = [f"many/{number}" for number in range(3000)]
    for key in keys[::500]:
        store.put(key, b"x", timeout_s=SOON)
    assert store.exists(keys, timeout_s=SOON) == frozenset(keys[::500])


def test_a_closed_connection_is_opened_anew() -> None:
    """A server that closed idle connections is asked again, and the caller sees nothing of it."""
    store = store_at(redis_port())
    store.put("kept", b"x", timeout_s=SOON)
    redis.Redis(port=redis_port()).client_kill_filter(_type="normal", skipme=True)
    assert get(store, "kept") == bytearray(b"x")


def test_a_full_server_is_unavailable() -> None:
    """A server without room refuses a value, and keeps serving what it has."""
    port = start_redis("--maxmemory", "4mb", "--databases", "1000")
    store = store_at(port)
    store.put("a", b"x", timeout_s=SOON)
    with pytest.raises(UnavailableError, match="maxmemory"):
        fill(store, 8 << 20)
    assert get(store) == bytearray(b"x")


def test_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants a password gets the one of the environment; without, it is unavailable."""
    url = f"redis://127.0.0.1:{start_redis(password=PASSWORD)}"
    with pytest.raises(UnavailableError, match=r"[Aa]uthentication"):
        open_kv_store(url, max_bytes=1, ttl_s=9, timeout_s=SOON).exists(["a"], timeout_s=SOON)
    monkeypatch.setenv(ENV_STORE_PASSWORD, PASSWORD)
    store = open_kv_store(url, max_bytes=1, ttl_s=9, timeout_s=SOON)
    store.put("a", b"x", timeout_s=SOON)
    assert store.exists(["a"], timeout_s=SOON) == {"a"}


def test_a_frozen_server_takes_no_longer_than_it_may() -> None:
    """A server that stops in the middle of a value costs the time of a request, not more."""
    store_at(redis_port()).put("frozen", bytes(1 << 20), timeout_s=SOON)
    with HostileProxy(redis_port(), freeze_at=1 << 16) as proxy:
        store = store_at(proxy.port, timeout_s=0.3)
        started_s = time.monotonic()
        with pytest.raises(TransferError) as caught:
            get(store, "frozen")
        assert caught.value.reason == TransferReason.TIMEOUT
        assert time.monotonic() - started_s < 3


def test_a_slow_server_takes_no_longer_than_it_may() -> None:
    """A server that sends a little now and then costs the time of a request, not more."""
    store_at(redis_port()).put("slow", bytes(1 << 20), timeout_s=SOON)
    with HostileProxy(redis_port(), bytes_per_s=20_000) as proxy:
        store = store_at(proxy.port, timeout_s=0.5)
        started_s = time.monotonic()
        with pytest.raises(TransferError):
            get(store, "slow")
        assert time.monotonic() - started_s < 3


@contextmanager
def liar(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve one answer to every connection that asks for something; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1 << 16)
                    answer(connection)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_a_server_that_sends_too_much_is_cut_off() -> None:
    """A reply that claims terabytes, and goes on for as long as it is read, is read no further than a piece."""
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"$9999999999999\r\n")
        while True:
            sent += connection.send(bytes(1 << 16))

    with liar(flood) as port, pytest.raises(UnavailableError, match="longer than"):
        store_at(port).exists(["a"], timeout_s=SOON)
    # asked twice, and what lies in the socket buffers
    assert sent < 8 * PIECE_BYTES


def test_a_server_that_talks_nonsense_is_unavailable() -> None:
    """An answer that is none of Redis's ends the request with a type."""
    with (
        liar(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port,
        pytest.raises(UnavailableError),
    ):
        store_at(port).put("a", b"x", timeout_s=SOON)
