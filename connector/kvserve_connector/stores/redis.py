"""A KV store in Redis or Valkey."""

import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvserve_api.errors import (
    TransferError,
    TransferReason,
    UnavailableError,
    WireError,
    WireReason,
)
from kvserve_connector.stores.store import Buffer, Stopwatch

T = TypeVar("T")
PIECE_BYTES: Final = 4 << 20
"""Most bytes of a value that are asked for at once."""
_REPLY_BYTES: Final = PIECE_BYTES + (1 << 16)
"""No reply to anything that is asked here is longer; there are at most `_KEYS` short ones in one round trip."""
_KEYS: Final = 1024
_READ_BYTES: Final = 1 << 18
"""What is read of a reply at once: the default of 64 KiB costs a third more of the processor."""


class RedisStore:
    """Values by key in a Redis or Valkey server, which lets them expire itself.

    How much it holds is the server's business, too: give it ``maxmemory`` and the policy ``allkeys-lru``. Without, a
    server that is full refuses what is put.

    Args:
        url: ``redis://host:port/database``, or ``rediss://`` over TLS.
        ttl_s: Seconds after which a value has expired.
        timeout_s: Most seconds until one request is answered whole.
        username: Who to be there; None for the default user.
        password: Its password; None where none is needed.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float,
        timeout_s: float,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        secure = url.startswith("rediss:")
        pool = redis.ConnectionPool.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            username=username,
            password=password,
            protocol=2,
            socket_read_size=_READ_BYTES,
            # a connection that the server closed while it was idle is opened anew, once
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        pool.connection_class = _SecureConnection if secure else _PlainConnection
        self._client: Any = redis.Redis(connection_pool=pool)
        self._ttl_ms = max(1, round(ttl_s * 1000))

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        watch.check()
        # one round trip for what is small
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.strlen(key)
            pipeline.getrange(key, 0, PIECE_BYTES - 1)
            # GETRANGE takes a value that is not there for an empty one
            pipeline.exists(key)
            nbytes, first, there = self._ask(pipeline.execute)
        if not there:
            return None
        if nbytes > max_bytes:
            raise WireError(
                WireReason.TOO_LARGE, f"a stored value of {nbytes} bytes, most is {max_bytes}"
            )
        value = bytearray(first)
        while len(value) < nbytes:
            watch.check()
            at = len(value)
            piece = self._ask(partial(self._client.getrange, key, at, at + PIECE_BYTES - 1))
            if not piece:
                # it has gone, or is another one now: what is missing shows in its checksum
                break
            value += piece
        return value if len(value) <= max_bytes else value[:max_bytes]

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """See `Store`."""
        Stopwatch(timeout_s).check()
        self._ask(lambda: self._client.set(key, memoryview(value).cast("B"), px=self._ttl_ms))

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        found: set[str] = set()
        for at in range(0, len(keys), _KEYS):
            watch.check()
            asked = keys[at : at + _KEYS]
            with self._client.pipeline(transaction=False) as pipeline:
                for key in asked:
                    pipeline.exists(key)
                there = self._ask(pipeline.execute)
            found.update(key for key, is_there in zip(asked, there, strict=True) if is_there)
        return frozenset(found)

    def delete(self, key: str, *, timeout_s: float) -> None:
        """See `Store`."""
        self._ask(lambda: self._client.unlink(key))

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except redis.TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, "the KV store took too long") from error
        except (redis.RedisError, OSError, ValueError) as error:
            raise UnavailableError(f"KV store does not answer: {str(error)[:300]}") from error


class _Bounded:
    """A socket that gives no more for a request than any reply may have, and in no more time than it may take.

    What the client library reads is what the server says: a length of terabytes, or a byte a second.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._budget_s = inner.gettimeout() or 0.0
        self._until_s = 0.0
        self._left_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sendall(self, data: Buffer) -> None:
        self._until_s = time.monotonic() + self._budget_s
        self._left_bytes = _REPLY_BYTES
        self._inner.settimeout(self._budget_s)
        self._inner.sendall(data)

    def recv(self, nbytes: int) -> bytes:
        if self._inner.gettimeout() == 0:
            # a look whether an idle connection still lives
            return self._inner.recv(nbytes)
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._inner.settimeout(left_s)
        data = self._inner.recv(nbytes)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise OSError("the reply is longer than what was asked for")
        return data


class _PlainConnection(redis.Connection):
    def _connect(self) -> Any:
        return _Bounded(super()._connect())  # type: ignore[no-untyped-call]


class _SecureConnection(redis.SSLConnection):
    def _connect(self) -> Any:
        return _Bounded(super()._connect())  # type: ignore[no-untyped-call]
