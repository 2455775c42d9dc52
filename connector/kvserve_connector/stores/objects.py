"""A KV store of objects: S3-compatible servers, and what else obstore knows."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import obstore
from obstore.exceptions import BaseError

from kvserve_api.errors import (
    TransferError,
    TransferReason,
    UnavailableError,
    WireError,
    WireReason,
)
from kvserve_connector.stores.store import Buffer, Stopwatch

_READ_BYTES: Final = 4 << 20
HEADS: Final = 64
"""Keys that are asked for at once: no question asks for several, and in turn each would take a round trip."""


class ObjectStore:
    """Objects by key.

    An object has expired when its time of change is older than ``ttl_s``; who reads it then removes it. How much a
    bucket may hold is its own business: give it a lifecycle rule of the same age. A single request ends by the client's
    own timeouts; between the pieces of an answer the time that is left is looked at.

    Args:
        client: A store of obstore's.
        ttl_s: Seconds after which a value has expired.
        now_s: The time, in seconds, as the server that stamps objects knows it.
    """

    def __init__(
        self,
        client: Any,
        ttl_s: float,
        now_s: Callable[[], float] = lambda: datetime.now(UTC).timestamp(),
    ) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._now_s = now_s

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        try:
            result = obstore.get(self._client, key)
            if self._expired(result.meta):
                obstore.delete(self._client, key)
                return None
            value = bytearray()
            # what the server says of the size is not believed either
            for piece in result.stream(min_chunk_size=_READ_BYTES):
                watch.check()
                value += memoryview(piece)
                if len(value) > max_bytes:
                    raise WireError(
                        WireReason.TOO_LARGE, f"a stored value of more than {max_bytes} bytes"
                    )
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error
        return value

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        watch.check()
        try:
            obstore.put(self._client, key, bytes(value))
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """See `Store`."""
        Stopwatch(timeout_s).check()
        try:
            there = asyncio.run(self._there(keys, timeout_s))
        except TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, "the KV store took too long") from error
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error
        return frozenset(key for key, is_there in zip(keys, there, strict=True) if is_there)

    def delete(self, key: str, *, timeout_s: float) -> None:
        """See `Store`."""
        try:
            obstore.delete(self._client, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error

    async def _there(self, keys: Sequence[str], timeout_s: float) -> list[bool]:
        """Ask for many keys side by side; the first that fails ends it."""
        turns = asyncio.Semaphore(HEADS)

        async def one(key: str) -> bool:
            async with turns:
                try:
                    return not self._expired(await obstore.head_async(self._client, key))
                except FileNotFoundError:
                    return False

        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*map(one, keys))

    def _expired(self, meta: Any) -> bool:
        return bool(self._now_s() - meta["last_modified"].timestamp() >= self._ttl_s)


def _unavailable(error: Exception) -> UnavailableError:
    # below its first line is a dump of the client
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return UnavailableError(f"KV store does not answer: {first}")
