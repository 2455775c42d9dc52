"""Values that belong to their keys: what a store gives under another key, or makes up, is not taken."""

import hmac
from collections.abc import Callable, Sequence
from typing import Final

from kvserve_api.credentials import proof
from kvserve_api.errors import WireError, WireReason
from kvserve_connector.stores.store import Buffer, Store

SEAL_BYTES: Final = 16
_PURPOSE: Final = "kvserve store 1 value"


def no_secrets() -> Sequence[bytes]:
    """Return that nothing is secret."""
    return ()


class SealedStore:
    """Puts a seal behind each value: an HMAC-SHA256 (RFC 2104) over its key and content.

    With a secret nobody without it can make a value that is taken. Without, the seal tells only that a value was put
    under this very key: a store that mixes up two prompts is found out, one that wants to deceive is not.

    Args:
        inner: The store.
        secrets: To seal with (the first) and to accept.
    """

    def __init__(self, inner: Store, secrets: Callable[[], Sequence[bytes]] = no_secrets) -> None:
        self._inner = inner
        self._secrets = secrets

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """See `Store`.

        Raises:
            WireError: It is too large, or its seal is not right.
        """
        value = self._inner.get(key, max_bytes=max_bytes + SEAL_BYTES, timeout_s=timeout_s)
        if value is None:
            return None
        given = bytes(value[-SEAL_BYTES:])
        del value[-SEAL_BYTES:]
        for secret in self._secrets() or (b"",):
            if hmac.compare_digest(given, _seal(secret, key, value)):
                return value
        raise WireError(
            WireReason.CHECKSUM_MISMATCH,
            "the value is damaged, or of another key, or sealed with another secret",
        )

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """See `Store`."""
        secret = next(iter(self._secrets()), b"")
        sealed = b"".join((value, _seal(secret, key, value)))
        self._inner.put(key, sealed, timeout_s=timeout_s)

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """See `Store`."""
        return self._inner.exists(keys, timeout_s=timeout_s)

    def delete(self, key: str, *, timeout_s: float) -> None:
        """See `Store`."""
        self._inner.delete(key, timeout_s=timeout_s)


def _seal(secret: bytes, key: str, value: Buffer) -> bytes:
    """Return the seal of a value."""
    own = proof(secret, _PURPOSE, key.encode())
    return hmac.digest(own, memoryview(value), "sha256")[:SEAL_BYTES]
