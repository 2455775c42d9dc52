"""A copy of one collection of the API server, kept by list and watch."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from kvserve_api.errors import KVServeError
from kvserve_controller.kube_client import Collection, GoneError, KubeClient

LEAST_BACKOFF_S: Final = 0.5
MOST_BACKOFF_S: Final = 30.0

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, str]
"""Namespace and name."""


class Reflector:
    """Keeps a copy of a collection; reconnects for ever, with jitter.

    Attributes:
        objects: The copy.
        synced: The collection was listed once.
        alive_s: When the server last answered or was last asked, on the monotonic clock, in seconds.
    """

    def __init__(
        self, client: KubeClient, collection: Collection, on_change: Callable[[], None]
    ) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.synced = False
        self.alive_s = time.monotonic()
        self._client = client
        self._collection = collection
        self._on_change = on_change

    async def run(self) -> None:
        """Follow the collection until cancelled."""
        version = ""
        backoff_s = LEAST_BACKOFF_S
        while True:
            self.alive_s = time.monotonic()
            try:
                if not version:
                    version = await self._list()
                version = await self._watch(version)
                backoff_s = LEAST_BACKOFF_S
            except GoneError:
                version = ""
            except KVServeError as error:
                # what was missed meanwhile shows when listing again
                version = ""
                log.warning(
                    "watch interrupted",
                    extra={"collection": self._collection.path, "why": str(error)},
                )
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(MOST_BACKOFF_S, backoff_s * 2)

    async def _list(self) -> str:
        objects, version = await self._client.list(self._collection)
        self.objects = {_key(item): item for item in objects}
        self.synced = True
        self._on_change()
        return version

    async def _watch(self, version: str) -> str:
        """Follow one watch to its end and return the version it came to."""
        async for event in self._client.watch(self._collection, version):
            self.alive_s = time.monotonic()
            version = event.object["metadata"]["resourceVersion"]
            if event.type == "BOOKMARK":
                continue
            if event.type == "DELETED":
                self.objects.pop(_key(event.object), None)
            else:
                self.objects[_key(event.object)] = event.object
            self._on_change()
        return version


def _key(item: dict[str, Any]) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
