"""The prefills elsewhere that requests of this engine still wait for room to fetch: their leases are kept alive."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from kvserve_connector.remote import Remote

logger = logging.getLogger(__name__)

SHARE_OF_LEASE: Final = 1 / 3
"""So early in a lease's time it is renewed: two messages may be lost."""
THREADS: Final = 4
"""Producers that are told at the same time: one that does not answer must not cost the others their leases."""


class Renewals:
    """Renews leases in threads of its own, from the first one until it is closed.

    Args:
        interval_s: How often, in seconds.
        send: Tells one producer that all these are still wanted; may take a while and may fail.
    """

    def __init__(self, interval_s: float, send: Callable[[Sequence[Remote]], None]) -> None:
        self._interval_s = interval_s
        self._send = send
        self._lock = threading.Lock()
        self._wanted: set[Remote] = set()
        self._under_way: dict[tuple[str, int], Future[None]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvserve-renew")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, remote: Remote) -> None:
        """Keep a prefill's lease alive from now on."""
        with self._lock:
            self._wanted.add(remote)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvserve-renewals", daemon=True
                )
                self._thread.start()

    def drop(self, remote: Remote) -> None:
        """Let a lease take its course: it is being fetched, or not wanted any more."""
        with self._lock:
            self._wanted.discard(remote)

    def __len__(self) -> int:
        with self._lock:
            return len(self._wanted)

    def close(self) -> None:
        """Stop renewing."""
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self._lock:
                wanted = list(self._wanted)
            by_producer: dict[tuple[str, int], list[Remote]] = {}
            for remote in wanted:
                by_producer.setdefault((remote.host, remote.port), []).append(remote)
            self._under_way = {k: f for k, f in self._under_way.items() if not f.done()}
            for where, remotes in by_producer.items():
                if where not in self._under_way and not self._stop.is_set():
                    self._under_way[where] = self._threads.submit(self._send, remotes)
