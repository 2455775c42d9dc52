"""What the connector asks of a KV store, and what it counts of it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeAlias, TypeVar

from kvserve_api.errors import KVServeError, TransferError, TransferReason, UnavailableError

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")
FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 30.0


class Store(Protocol):
    """Values by key, which may be gone at any time; safe from any thread.

    A key is a path of letters, digits, ``-`` and ``/``. Nothing is promised of a value but that it was once put under
    its key by somebody: readers check what they get.
    """

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """Return a value; None if there is none, or it has expired.

        Args:
            key: Its key.
            max_bytes: More is not read.
            timeout_s: Most seconds it may take.

        Raises:
            WireError: The value is larger.
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        ...

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """Put a value, whole or not at all; the last of several writers wins.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer, or has no room.
        """
        ...

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """Return those of the keys that have a value; it may be gone when it is asked for.

        Raises:
            TransferError: It took too long.
            UnavailableError: The store does not answer.
        """
        ...

    def delete(self, key: str, *, timeout_s: float) -> None:
        """Remove a value if there is one.

        Raises:
            UnavailableError: The store does not answer.
        """
        ...


class Stopwatch:
    """The time that is left for an operation.

    Args:
        timeout_s: Seconds from now on.
        now_s: A clock that never goes back.
    """

    def __init__(self, timeout_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._until_s = now_s() + timeout_s
        self._now_s = now_s

    def check(self) -> None:
        """Go on if there is time left.

        Raises:
            TransferError: There is none.
        """
        if self._now_s() >= self._until_s:
            raise TransferError(TransferReason.TIMEOUT, "the KV store took too long")


class GuardedStore:
    """A store that is left alone for a while when it does not answer, and whose outcomes are counted.

    Args:
        inner: The store.
        now_s: A clock that never goes back.
    """

    def __init__(self, inner: Store, now_s: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._now_s = now_s
        self._again_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def take_counts(self) -> dict[tuple[str, str], int]:
        """Return how often each operation ended how since the last call: ``Hit``, ``Miss``, ``Done`` or a reason."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """See `Store`."""
        value = self._ask(
            "get", lambda: self._inner.get(key, max_bytes=max_bytes, timeout_s=timeout_s)
        )
        self._count("get", "Miss" if value is None else "Hit")
        return value

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """See `Store`."""
        self._ask("put", lambda: self._inner.put(key, value, timeout_s=timeout_s))
        self._count("put", "Done")

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """See `Store`."""
        found = self._ask("exists", lambda: self._inner.exists(keys, timeout_s=timeout_s))
        self._count("exists", "Done")
        return found

    def delete(self, key: str, *, timeout_s: float) -> None:
        """See `Store`."""
        self._ask("delete", lambda: self._inner.delete(key, timeout_s=timeout_s))
        self._count("delete", "Done")

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        left_s = self._again_s - self._now_s()
        if left_s > 0:
            self._count(what, UnavailableError.reason)
            raise UnavailableError("the KV store did not answer lately", retry_after_s=left_s)
        try:
            answer = call()
        except KVServeError as error:
            self._count(what, error.reason)
            if error.reason in (UnavailableError.reason, TransferReason.TIMEOUT):
                self._again_s = self._now_s() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
            raise
        self._pause_s = FIRST_PAUSE_S
        return answer

    def _count(self, what: str, how: str) -> None:
        with self._lock:
            self._counts[what, how] += 1
