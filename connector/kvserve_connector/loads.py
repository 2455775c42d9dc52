"""What a link or a coder was asked for lately, from the arrivals themselves, and what it was promised."""

import math
import threading
from typing import Final

from kvserve_api.latency import NO_LOAD, Load

MEMORY_S: Final = 15.0
"""Arrivals count with a weight that falls by a factor e in so many seconds."""
LEAST_ARRIVALS: Final = 2.0
"""Fewer remembered arrivals than that are no load, only an event."""
TINY_S: Final = 1e-6
"""What is left of sums and differences of promises is nothing."""


class Arrivals:
    """Exponentially weighted arrivals; safe from any thread.

    Args:
        now_s: When counting begins, on the clock of the other calls.
        memory_s: Time constant, in seconds.
    """

    def __init__(self, now_s: float, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._lock = threading.Lock()
        self._at_s = now_s
        self._count = 0.0
        self._bytes = 0.0

    def load(self, now_s: float, share: float = 1.0) -> Load:
        """Return what was asked for lately.

        Args:
            now_s: The time.
            share: The part of it that falls to one of several coders that work side by side.
        """
        with self._lock:
            fade = math.exp(-max(0.0, now_s - self._at_s) / self._memory_s)
            count, native_bytes = self._count * fade, self._bytes * fade
        if count < LEAST_ARRIVALS:
            return NO_LOAD
        scale = share / self._memory_s
        return Load(arrivals_per_s=count * scale, native_bytes_per_s=native_bytes * scale)

    def add(self, now_s: float, native_bytes: int) -> None:
        """Count a transfer."""
        with self._lock:
            fade = math.exp(-max(0.0, now_s - self._at_s) / self._memory_s)
            self._count = self._count * fade + 1
            self._bytes = self._bytes * fade + native_bytes
            self._at_s = max(now_s, self._at_s)


class Coders:
    """The threads of one producer that encode: how much was promised of them, and how often they are asked.

    Args:
        threads: How many code side by side.
        now_s: When counting begins, on the clock of the other calls.
    """

    def __init__(self, threads: int, now_s: float) -> None:
        self.share = 1 / threads
        self.arrivals = Arrivals(now_s)
        self._lock = threading.Lock()
        self._promised_s = 0.0

    @property
    def backlog_s(self) -> float:
        """Seconds until what was promised is encoded."""
        return self._promised_s * self.share if self._promised_s >= TINY_S else 0.0

    def promise(self, encode_s: float) -> None:
        """Take note of encoding that was promised (positive) or is done (negative), in seconds of one thread."""
        with self._lock:
            self._promised_s += encode_s
