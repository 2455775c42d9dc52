"""Which KV store a URL means."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvserve_api.errors import SpecError
from kvserve_api.names import ENV_STORE_PASSWORD, ENV_STORE_USERNAME
from kvserve_connector.stores.folder import FolderStore
from kvserve_connector.stores.objects import ObjectStore
from kvserve_connector.stores.redis import RedisStore
from kvserve_connector.stores.store import GuardedStore
from kvserve_strategies.artifacts import Patience, open_client

FIELD = "store"


def open_kv_store(
    url: str, *, max_bytes: int, ttl_s: float, timeout_s: float, fsync: bool = False
) -> GuardedStore:
    """Return the KV store at a URL; nothing is asked of it yet.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix`` (credentials and endpoint by the usual ``AWS_…`` variables),
            ``redis://host:port/database`` or, over TLS, ``rediss://`` (Valkey, too; user and password by
            ``KVSERVE_STORE_USERNAME`` and ``KVSERVE_STORE_PASSWORD``), or ``memory:///`` (of this object only).
        max_bytes: Most bytes of a folder; buckets and Redis have rules of their own.
        ttl_s: Seconds after which a value has expired.
        timeout_s: Most seconds of one request to a server. It is not repeated: recomputing is faster.
        fsync: See `FolderStore`.

    Raises:
        SpecError: It is no such URL.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username or parts.password:
        raise SpecError(FIELD, "must be a plain URL: credentials belong into the environment")
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise SpecError(FIELD, f"must be file:///folder, got {url!r:.200}")
        folder = Path(unquote(parts.path))
        return GuardedStore(FolderStore(folder, max_bytes=max_bytes, ttl_s=ttl_s, fsync=fsync))
    if parts.scheme in ("redis", "rediss"):
        return GuardedStore(_redis(url, ttl_s=ttl_s, timeout_s=timeout_s))
    if parts.scheme not in ("s3", "memory"):
        raise SpecError(
            FIELD,
            f"must begin with file://, s3://, redis://, rediss:// or memory://, got {url!r:.200}",
        )
    patience = Patience(
        connect_s=timeout_s, read_s=timeout_s, request_s=timeout_s, retries=0, retry_s=timeout_s
    )
    return GuardedStore(ObjectStore(open_client(url, patience), ttl_s))


def _redis(url: str, *, ttl_s: float, timeout_s: float) -> RedisStore:
    parts = urlsplit(url)
    try:
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    database = parts.path.removeprefix("/")
    if not known or (database and not database.isdecimal()):
        raise SpecError(FIELD, f"must be {parts.scheme}://host:port/number, got {url!r:.200}")
    return RedisStore(
        url,
        ttl_s=ttl_s,
        timeout_s=timeout_s,
        username=os.environ.get(ENV_STORE_USERNAME) or None,
        password=os.environ.get(ENV_STORE_PASSWORD) or None,
    )
