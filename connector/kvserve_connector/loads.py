"""What a link or a coder was asked for lately, from the arrivals themselves."""

import math
import threading
from typing import Final

from kvserve_api.latency import NO_LOAD, Load

MEMORY_S: Final = 15.0
"""Arrivals count with a weight that falls by a factor e in so many seconds."""
LEAST_ARRIVALS: Final = 2.0
"""Fewer remembered arrivals than that are no load, only an event."""


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
