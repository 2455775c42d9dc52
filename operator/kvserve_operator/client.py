"""Requests to the API server: credentials, time limits, retries, and the fence that stops a deposed leader's writes."""

import asyncio
import json
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import kopf
from opentelemetry import metrics

from kvserve_api.errors import KVServeError, SpecError, UnavailableError
from kvserve_api.otel import counter
from kvserve_api.telemetry import ATTR_KIND, ATTR_VERB, OPERATOR_WRITES

FIELD_MANAGER: Final = "kvserve-operator"
APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"
JSON: Final = "application/json"
REQUEST_TIMEOUT_S: Final = 4.0
"""Shorter than the time between the end of a leader's right to write and the next leader's start."""
ATTEMPTS: Final = 4
MAX_RETRY_AFTER_S: Final = 30.0
_RETRIED: Final = (429, 500, 502, 503, 504)

logger = logging.getLogger(__name__)


class ApiError(KVServeError):
    """The API server refused a request; the same request would be refused again.

    Attributes:
        status: The HTTP status.
        cause: The API server's reason, like ``Conflict``.
        message: The API server's message.
    """

    reason = "Refused"

    def __init__(self, status: int, cause: str, message: str, causes: tuple[str, ...] = ()) -> None:
        super().__init__(f"{status} {cause}: {message}")
        self.status = status
        self.cause = cause
        self.message = message
        self.causes = causes


class NotLeaderError(KVServeError):
    """This process may not write: another one leads, or the lease could not be renewed in time."""

    reason = "NotLeader"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A connection with credentials.

    Attributes:
        server: Base address of the API server.
        http: The HTTP session.
    """

    server: str
    http: aiohttp.ClientSession


def log_in(**_: Any) -> kopf.ConnectionInfo:
    """Return the pod's credentials, or those of ``KUBECONFIG`` outside a cluster.

    Raises:
        SpecError: There are none, or the file makes no sense.
    """
    settings = kopf.OperatorSettings()
    try:
        info = kopf.login_with_kubeconfig(settings=settings) or kopf.login_with_service_account(
            settings=settings
        )
    # kopf reads the file without checks, so anything may come of a wrong one
    except Exception as error:
        raise SpecError("KUBECONFIG", f"can't be used: {error!r}") from error
    if info is None or not info.server:
        raise SpecError("KUBECONFIG", "names no API server; set it, or run in a pod")
    return info


def open_session(info: kopf.ConnectionInfo) -> Session:
    """Open a session with credentials."""
    context: ssl.SSLContext = info.as_ssl_context()
    http = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context),
        headers={**info.as_http_headers(), "User-Agent": "kvserve-operator"},
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    )
    return Session(server=info.server.rstrip("/"), http=http)


class Client:
    """Asks the API server, and writes while ``may_write`` says so.

    Attributes:
        may_write: Whether this process leads; asked right before each write but those of the lease.
    """

    def __init__(
        self,
        credentials: Callable[[], kopf.ConnectionInfo] = log_in,
        *,
        may_write: Callable[[], bool] = lambda: True,
        rng: random.Random | None = None,
    ) -> None:
        self.may_write = may_write
        self._credentials = credentials
        self._session: Session | None = None
        self._rng = rng or random.Random()
        self._writes = counter(metrics.get_meter("kvserve.operator"), OPERATOR_WRITES)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the session; the next request opens another."""
        session, self._session = self._session, None
        if session:
            await session.http.close()

    async def get(self, path: str) -> dict[str, Any]:
        """Read an object.

        Raises:
            ApiError: It does not exist or may not be read.
            UnavailableError: The API server does not answer.
        """
        return await self._retried("GET", path, None, JSON, {})

    async def write(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        content_type: str = JSON,
        params: Mapping[str, str] | None = None,
        kind: str,
    ) -> dict[str, Any]:
        """Write an object, as leader only.

        Args:
            method: ``POST``, ``PATCH`` or ``DELETE``.
            path: Its path on the API server.
            body: What to send.
            content_type: What the body is.
            params: Of the query.
            kind: The object's kind, for the count of writes.

        Returns:
            The API server's answer, mostly the object as it is now.

        Raises:
            ApiError: The API server refuses.
            NotLeaderError: This process does not lead.
            UnavailableError: The API server does not answer, or not in time.
        """
        self._writes.add(1, {ATTR_KIND: kind, ATTR_VERB: method})
        return await self._retried(method, path, body, content_type, params or {})

    async def lease(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Read or write a lease: once, and whoever leads."""
        return await self._request(method, path, body, JSON, {})

    async def _retried(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        content_type: str,
        params: Mapping[str, str],
    ) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            if method != "GET" and not self.may_write():
                raise NotLeaderError("the lease is not held")
            try:
                return await self._request(method, path, body, content_type, params)
            except UnavailableError as error:
                if attempt == ATTEMPTS:
                    raise
                pause_s = min(
                    MAX_RETRY_AFTER_S,
                    max(error.retry_after_s, 0.25 * 2**attempt * self._rng.uniform(0.5, 1.0)),
                )
                logger.warning("%s %s: %s; again in %.1f s", method, path, error, pause_s)
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        content_type: str,
        params: Mapping[str, str],
    ) -> dict[str, Any]:
        session = self._session = self._session or open_session(self._credentials())
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type, "Accept": JSON}
        try:
            async with session.http.request(
                method, f"{session.server}{path}", data=data, headers=headers, params=params
            ) as response:
                text = await response.read()
                return await self._answer(response, text)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"the API server does not answer: {error!r}", retry_after_s=0.0
            ) from error

    async def _answer(self, response: aiohttp.ClientResponse, text: bytes) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = {}
        if not isinstance(value, dict):
            value = {}
        if response.status < 400:
            return value
        message = str(value.get("message") or response.reason)[:1024]
        if response.status == 401:
            # a token is renewed on disk before it ends: the next attempt reads it
            await self.close()
            raise UnavailableError(f"401 Unauthorized: {message}", retry_after_s=1.0)
        if response.status in _RETRIED:
            raise UnavailableError(
                f"{response.status}: {message}", retry_after_s=_retry_after_s(response)
            )
        causes = (value.get("details") or {}).get("causes") or []
        raise ApiError(
            response.status,
            str(value.get("reason") or response.reason),
            message,
            tuple(str(cause.get("reason", "")) for cause in causes),
        )


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0
