"""The three requests the controller makes of an API server: list, watch, and server-side apply of a status."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from kvserve_api.errors import SpecError, UnavailableError
from kvserve_controller.kubeconfig import Access

REQUEST_TIMEOUT_S: Final = 30.0
WATCH_S: Final = 240
"""How long the server keeps a watch open."""
SILENCE_S: Final = 100.0
"""A watch that brings nothing for so long, not even a bookmark (one a minute), is dead."""
PAGE: Final = 500
MAX_LINE_BYTES: Final = 4 << 20
"""Longest line of a watch: an object is at most 1.5 MiB in etcd."""


class GoneError(UnavailableError):
    """The resource version is too old to watch from: list again."""

    reason = "Gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """Objects of one kind.

    Attributes:
        prefix: Like ``/api/v1`` or ``/apis/kvserve.io/v1alpha1``.
        plural: Like ``configmaps``.
        namespace: Of which namespace; empty for all.
        selector: Label selector; empty for all.
    """

    prefix: str
    plural: str
    namespace: str = ""
    selector: str = ""

    @property
    def path(self) -> str:
        """The path below the server's URL."""
        where = f"/namespaces/{self.namespace}" if self.namespace else ""
        return f"{self.prefix}{where}/{self.plural}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What a watch brings: ADDED, MODIFIED, DELETED or BOOKMARK."""

    type: str
    object: dict[str, Any]


class KubeClient:
    """A session with an API server; an asynchronous context manager."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the session."""
        connector = aiohttp.TCPConnector(ssl=self._access.tls or True)
        self._session = aiohttp.ClientSession(
            self._access.url, connector=connector, read_bufsize=MAX_LINE_BYTES
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()

    async def list(self, collection: Collection) -> tuple[list[dict[str, Any]], str]:
        """Return all objects and the resource version to watch from.

        Raises:
            UnavailableError: The server can't be reached, or refuses.
        """
        objects: list[dict[str, Any]] = []
        parameters = {"limit": str(PAGE), "labelSelector": collection.selector}
        while True:
            page = await self._request("GET", collection.path, parameters)
            objects += page.get("items", [])
            metadata = page.get("metadata", {})
            if not metadata.get("continue"):
                return objects, str(metadata.get("resourceVersion", ""))
            parameters["continue"] = metadata["continue"]

    async def watch(self, collection: Collection, version: str) -> AsyncIterator[Event]:
        """Yield what changes after a resource version, until the server ends the watch.

        Raises:
            GoneError: The version is too old.
            UnavailableError: The server can't be reached, refuses, or has fallen silent.
        """
        parameters = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
            "labelSelector": collection.selector,
        }
        timeout = aiohttp.ClientTimeout(total=None, connect=REQUEST_TIMEOUT_S, sock_read=SILENCE_S)
        try:
            async with self._open.get(
                collection.path, params=parameters, headers=self._access.headers(), timeout=timeout
            ) as response:
                await _check(response)
                async for line in response.content:
                    yield _event(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise UnavailableError(f"watch of {collection.path}: {_words(error)}") from error

    async def apply_status(
        self, prefix: str, plural: str, document: Mapping[str, Any], *, manager: str
    ) -> None:
        """Apply the fields of an object's status that are ours.

        Raises:
            SpecError: The server refuses what was written.
            UnavailableError: It can't be reached, or is busy.
        """
        metadata = document["metadata"]
        path = f"{prefix}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}/status"
        await self._request(
            "PATCH",
            path,
            {"fieldManager": manager, "force": "true"},
            body=json.dumps(document),
            content_type="application/apply-patch+yaml",
        )

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise UnavailableError("the session with the API server is not open")
        return self._session

    async def _request(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str],
        *,
        body: str | None = None,
        content_type: str = "application/json",
    ) -> Any:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        headers = {**self._access.headers(), "Content-Type": content_type}
        try:
            async with self._open.request(
                method, path, params=parameters, data=body, headers=headers, timeout=timeout
            ) as response:
                await _check(response)
                return await response.json()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise UnavailableError(f"{method} {path}: {_words(error)}") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise what an answer other than success means."""
    if response.status < 400:
        return
    text = (await response.content.read(4096)).decode(errors="replace")
    try:
        message = json.loads(text).get("message", text)
    except (ValueError, AttributeError):
        message = text
    told = f"{response.method} {response.url.path}: {response.status}: {message}"
    if response.status == 410:
        raise GoneError(told)
    if response.status in (400, 404, 409, 422):
        raise SpecError("request", told)
    retry = response.headers.get("Retry-After", "")
    raise UnavailableError(told, retry_after_s=min(float(retry), 60) if retry.isdecimal() else 5.0)


def _event(line: bytes) -> Event:
    value = json.loads(line)
    event = Event(type=value["type"], object=value["object"])
    if event.type == "ERROR":
        message = f"{event.object.get('reason')}: {event.object.get('message')}"
        if event.object.get("code") == 410:
            raise GoneError(message)
        raise UnavailableError(message)
    return event


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
