"""A queue of keys: each is worked on by one worker at a time, waits once however often it is added, and backs off."""

import asyncio
import random
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 300.0


class KeyedQueue(Generic[K]):
    """Keys to work on, soon or later.

    A key that is added while it is worked on waits until that is done, and is then handed out again.
    """

    def __init__(self, *, rng: random.Random | None = None) -> None:
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: set[K] = set()
        self._working: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._rng = rng or random.Random()

    def add(self, key: K) -> None:
        """Hand the key out as soon as a worker is free."""
        if key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._working:
            self._ready.put_nowait(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Hand the key out after a delay, or at an earlier time that was asked for before."""
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._ring, key)

    async def get(self) -> K:
        """Wait for a key; `done` must follow."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """Tell that the work on a key has ended."""
        self._working.discard(key)
        if key in self._waiting:
            self._ready.put_nowait(key)

    def succeeded(self, key: K) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    def failed(self, key: K, *, at_least_s: float = 0.0) -> float:
        """Hand the key out again after a delay that doubles with each failure in a row.

        Args:
            key: The key.
            at_least_s: The shortest delay, in seconds.

        Returns:
            The delay, in seconds.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures, 16))
        delay_s = max(at_least_s, delay_s * self._rng.uniform(0.8, 1.2))
        self.add_after(key, delay_s)
        return delay_s

    def close(self) -> None:
        """Cancel the delays."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _ring(self, key: K) -> None:
        del self._timers[key]
        self.add(key)
