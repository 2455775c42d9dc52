"""A consumer's connections to producers, kept between transfers."""

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from kvserve_api.errors import KVServeError
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Gate
from kvserve_connector.remote import Remote

MAX_IDLE: Final = 16
"""Connections kept open for the next transfer."""


class Connections:
    """Connections to producers; those that are free are kept for the next transfer. Safe from any thread.

    Args:
        gate: The way to them.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._lock = threading.Lock()
        self._idle: deque[tuple[str, int, FrameSocket]] = deque()

    def connect(self, remote: Remote, timeout_s: float) -> FrameSocket:
        """Open a connection to a producer.

        Raises:
            KVServeError: It can't be reached, or is not one of ours.
        """
        return self._gate.connect(remote.host, remote.port, timeout_s=timeout_s)

    def take(self, remote: Remote) -> FrameSocket | None:
        """Return a kept connection to the producer."""
        with self._lock:
            for entry in reversed(self._idle):
                if entry[:2] == (remote.host, remote.port):
                    self._idle.remove(entry)
                    return entry[2]
        return None

    def keep(self, remote: Remote, frames: FrameSocket) -> None:
        """Keep a connection for the next transfer."""
        with self._lock:
            self._idle.append((remote.host, remote.port, frames))
            dropped = self._idle.popleft()[2] if len(self._idle) > MAX_IDLE else None
        if dropped is not None:
            dropped.close()

    def say(self, remote: Remote, messages: Iterable[bytes], limit_s: float) -> None:
        """Send a producer what it does not answer; if that fails, nothing comes of it.

        Args:
            remote: The producer.
            messages: Whole frames.
            limit_s: Most seconds for all of them.
        """
        with suppress(KVServeError):
            frames = self.take(remote) or self.connect(remote, limit_s)
            frames.set_budget(limit_s)
            for message in messages:
                frames.send(message)
            self.keep(remote, frames)

    def close(self) -> None:
        """Close those that are kept."""
        while self._idle:
            self._idle.popleft()[2].close()
