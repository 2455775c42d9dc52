"""Real KV stores of each kind, and a clock for them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obstore.store import LocalStore, MemoryStore

from kvserve_connector.stores.folder import FolderStore
from kvserve_connector.stores.objects import ObjectStore
from kvserve_connector.stores.store import Store

TTL_S = 100.0


class Clock:
    """A clock that a test moves on from the real time."""

    def __init__(self) -> None:
        self.real_s = time.time
        self.ahead_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.real_s() + self.ahead_s


Make = Callable[[Path, Clock], Store]


def _folder(path: Path, clock: Clock) -> Store:
    return FolderStore(path / "kv", max_bytes=1 << 20, ttl_s=TTL_S, now_s=clock)


def _objects(client: Any) -> Make:
    return lambda path, clock: ObjectStore(client(path), TTL_S, now_s=clock)


KINDS: dict[str, Make] = {
    "folder": _folder,
    "memory": _objects(lambda _: MemoryStore()),
    "local-objects": _objects(lambda path: LocalStore(path / "objects", mkdir=True)),
}
