"""Real KV stores of each kind, and a clock for them."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obstore.store import LocalStore, MemoryStore, S3Store

from kvserve_connector.stores.folder import FolderStore
from kvserve_connector.stores.objects import ObjectStore
from kvserve_connector.stores.redis import RedisStore
from kvserve_connector.stores.store import Store
from store_servers import BUCKET, redis_port, s3_endpoint

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


def _s3(path: Path) -> S3Store:
    return S3Store(
        BUCKET,
        prefix=str(path).strip("/"),
        endpoint=s3_endpoint(),
        access_key_id="key",
        secret_access_key="secret",
        client_options={"allow_http": True},
    )


_databases: dict[Path, int] = {}
_numbers = itertools.count()


def _redis(path: Path, clock: Clock) -> Store:
    """Return the database of a path; its values expire by the server's clock."""
    database = _databases.get(path)
    if database is None:
        database = _databases[path] = next(_numbers)
    url = f"redis://127.0.0.1:{redis_port()}/{database}"
    return RedisStore(url, ttl_s=TTL_S, timeout_s=5)


KINDS: dict[str, Make] = {
    "folder": _folder,
    "memory": _objects(lambda _: MemoryStore()),
    "local-objects": _objects(lambda path: LocalStore(path / "objects", mkdir=True)),
    "s3": _objects(_s3),
    "redis": _redis,
}
CLOCKED = [kind for kind in KINDS if kind != "redis"]
"""Those that take a clock of ours."""
