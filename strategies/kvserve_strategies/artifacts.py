"""The artifact store: calibration bundles by digest, behind a URL.

A bundle lies under ``<64 hex digits of its digest>/``, its manifest written last, so that a bundle that was not
written whole can't be seen. What is fetched is believed only as far as it matches the digest that was asked for: the
store, and whoever can write to it, need not be trusted.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, LocalStore, MemoryStore, S3Store

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError, SpecError, UnavailableError, UnsupportedError
from kvserve_strategies.bundle.basis import BasisKey
from kvserve_strategies.bundle.bundle import Bundle
from kvserve_strategies.bundle.cache import CacheFolder
from kvserve_strategies.bundle.manifest import MANIFEST, MAX_MANIFEST_NBYTES, Manifest
from kvserve_strategies.bundle.writer import verified_files

logger = logging.getLogger(__name__)

SCHEMES: Final = ("file", "s3", "http", "https", "memory")
FIELD: Final = "artifacts"
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_CHUNK_NBYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a store may take.

    Attributes:
        connect_s: To connect.
        read_s: Between two pieces of an answer.
        request_s: For one whole answer.
        retries: How often a request is repeated after a failure that may pass.
        retry_s: After this time a request is not repeated.
    """

    connect_s: float = 5.0
    read_s: float = 20.0
    request_s: float = 900.0
    retries: int = 3
    retry_s: float = 30.0

    @property
    def options(self) -> dict[str, Any]:
        """The same as obstore takes it."""
        return {
            "client_options": {
                "connect_timeout": timedelta(seconds=self.connect_s),
                "read_timeout": timedelta(seconds=self.read_s),
                "timeout": timedelta(seconds=self.request_s),
            },
            "retry_config": {
                "max_retries": self.retries,
                "retry_timeout": timedelta(seconds=self.retry_s),
            },
        }


class _MissingError(ArtifactError):
    """An object that is not in the store."""


@dataclass(slots=True)
class Store:
    """An artifact store; safe for many threads and processes at once.

    Attributes:
        url: Where it is, as it was given.
        patience: How long it may take.
    """

    url: str
    patience: Patience = field(default_factory=Patience)
    _client: Any = None

    @classmethod
    def of(cls, url: str, patience: Patience | None = None) -> Self:
        """See `open_store`."""
        store = cls(url, patience or Patience())
        if urlsplit(url).scheme != "file":
            store._client = open_client(url, store.patience)
        return store

    def put_bundle(self, folder: Path) -> str:
        """Store the bundle in a folder, or what of it is not there yet, and return its digest.

        Raises:
            ArtifactError: There is no bundle in the folder, or it is damaged.
            UnsupportedError: The store is read-only.
            SpecError: The store refuses us.
            UnavailableError: It does not answer, or can't be written now.
        """
        bundle = Bundle.open(folder)
        name = _hex(bundle.digest)
        if urlsplit(self.url).scheme in ("http", "https"):
            raise UnsupportedError(f"{self.url} is read-only: put bundles where the server reads")
        client = self._open(write=True)
        # a file may be a half one as long as there is no manifest
        is_whole = self._manifest(name, bundle.digest, or_none=True) is not None
        for file, path in verified_files(folder, bundle.manifest):
            nbytes = bundle.manifest.files[file].nbytes
            if not (is_whole and self._size(client, f"{name}/{file}") == nbytes):
                self._put(client, f"{name}/{file}", path)
        if not is_whole:
            self._put(client, f"{name}/{MANIFEST}", bundle.manifest.canonical())
        return bundle.digest

    def get_bundle(self, digest: str, basis_keys: Collection[BasisKey] | None = None) -> Bundle:
        """Return a bundle, from the cache on this machine where it can be.

        Args:
            digest: Which.
            basis_keys: The bases to have at hand; None for all. Others are an error when they are asked for.

        Raises:
            ArtifactError: It is not in the store, not the one of this digest, damaged, or lacks a basis.
            SpecError: The digest is none, or the store refuses us.
            UnavailableError: The store does not answer.
        """
        name = _hex(digest)
        if cache := CacheFolder.of(name):
            try:
                self._fill(cache, name, digest, basis_keys)
                return Bundle.open(cache.path, digest=digest)
            except OSError as error:
                logger.warning("can't keep bundle %s in %s: %s", digest, cache.path, error)
        bundle = Bundle.read(self._reader(name), digest=digest)
        bundle.manifest.needed(basis_keys)
        # without a cache the store is asked now, not in the middle of a transfer
        for key in bundle.basis_keys if basis_keys is None else basis_keys:
            bundle.basis(key)
        return bundle

    def _fill(
        self,
        cache: CacheFolder,
        name: str,
        digest: str,
        basis_keys: Collection[BasisKey] | None,
    ) -> None:
        """Fetch what the cache lacks or holds damaged."""
        document = cache.read(MANIFEST, MAX_MANIFEST_NBYTES + 1)
        if document is None or digest_bytes(document) != digest:
            document = self._manifest(name, digest)
            assert document is not None
        manifest = Manifest.parse(document)
        for file in manifest.needed(basis_keys):
            entry = manifest.files[file]
            if not cache.holds(file, entry):
                chunks = self._get(f"{name}/{file}", entry.nbytes)
                cache.write(file, chunks, entry)
        if cache.read(MANIFEST, len(document) + 1) != document:
            cache.write(MANIFEST, [document], manifest.entry)

    def _manifest(self, name: str, digest: str, *, or_none: bool = False) -> bytes | None:
        """Return a manifest that is the digest's.

        Raises:
            ArtifactError: There is none (unless ``or_none``), or it is another.
        """
        try:
            chunks = list(self._get(f"{name}/{MANIFEST}", MAX_MANIFEST_NBYTES))
        except _MissingError as error:
            if or_none:
                return None
            raise ArtifactError("digest", f"there is no bundle {digest} in {self.url}") from error
        document = b"".join(chunks)
        if digest_bytes(document) != digest:
            raise ArtifactError(
                "digest", f"{self.url} has another bundle in the place of {digest}: remove it there"
            )
        return document

    def _reader(self, name: str) -> Any:
        def read(file: str, limit: int) -> bytes:
            return b"".join(self._get(f"{name}/{file}", limit))

        return read

    def _get(self, path: str, limit: int) -> Iterator[bytes]:
        """Yield an object piece by piece, at most ``limit`` bytes of it.

        Raises:
            ArtifactError: It has more, or there is no such object.
        """
        client = self._open(write=False)
        try:
            left = limit
            for chunk in obstore.get(client, path).stream(min_chunk_size=_CHUNK_NBYTES):
                data = bytes(chunk)
                left -= len(data)
                if left < 0:
                    raise ArtifactError(path, f"has more than {limit} bytes in {self.url}")
                yield data
        except FileNotFoundError as error:
            raise _MissingError(path, f"is missing in {self.url}: put the bundle anew") from error
        except (BaseError, OSError) as error:
            raise self._refusal(error) from error

    def _size(self, client: Any, path: str) -> int | None:
        """Return the bytes of an object; None if there is none."""
        try:
            return int(obstore.head(client, path)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._refusal(error) from error

    def _put(self, client: Any, path: str, data: bytes | Path) -> None:
        try:
            obstore.put(client, path, data)
        except (BaseError, OSError) as error:
            raise self._refusal(error) from error

    def _open(self, *, write: bool) -> Any:
        if self._client is None:
            # a volume that is not mounted yet is no mistake: it is looked for each time
            try:
                folder = Path(unquote(urlsplit(self.url).path))
                self._client = LocalStore(folder, mkdir=write)
            except (BaseError, OSError) as error:
                raise self._refusal(error) from error
        return self._client

    def _refusal(self, error: Exception) -> Exception:
        """Return what to raise for an error of obstore."""
        # below its first line is a dump of the client
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
            return SpecError(FIELD, f"{self.url} refuses us, check its credentials: {text}")
        return UnavailableError(f"artifact store {self.url} does not answer: {text}")


def open_store(url: str, patience: Patience | None = None) -> Store:
    """Return the artifact store at a URL; nothing is asked of it yet.

    Args:
        url: ``file:///folder``, ``s3://bucket/prefix`` (credentials and endpoint by the usual ``AWS_…`` variables),
            ``http(s)://host/path`` (read-only), or ``memory:///`` (of this object only).
        patience: How long it may take.

    Raises:
        SpecError: It is no such URL.
    """
    try:
        parts = urlsplit(url)
        has_user = parts.username is not None or parts.password is not None
    except ValueError as error:
        raise SpecError(FIELD, f"{url!r:.200} is no URL: {error}") from error
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise SpecError(FIELD, f"must begin with one of {known}, got {url!r:.200}")
    if has_user or parts.query or parts.fragment:
        raise SpecError(FIELD, "must be a plain URL: credentials belong into the environment")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise SpecError(FIELD, f"must be file:///folder, got {url!r:.200}")
    if parts.scheme in ("s3", "http", "https") and not parts.hostname:
        raise SpecError(FIELD, f"names no bucket or host: {url!r:.200}")
    return Store.of(url, patience)


def open_client(url: str, patience: Patience) -> Any:
    """Return obstore's client of a URL that is not a folder's; nothing is asked of it yet.

    Raises:
        SpecError: It is no URL of a store.
    """
    scheme = urlsplit(url).scheme
    try:
        if scheme == "memory":
            return MemoryStore()
        options = patience.options
        if scheme == "s3":
            # client options of ours hide this one, which obstore reads from the environment like the others
            insecure = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
            options["client_options"]["allow_http"] = insecure
            return S3Store.from_url(url, **options)
        options["client_options"]["allow_http"] = scheme == "http"
        return HTTPStore.from_url(url, **options)
    except (BaseError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise SpecError(FIELD, f"{url!r:.200} is no URL of a store: {first}") from error


def _hex(digest: str) -> str:
    """Return the 64 hex digits of a digest."""
    match = _DIGEST.fullmatch(digest)
    if not match:
        raise SpecError("digest", f"must be sha256: and 64 hex digits, got {digest!r:.100}")
    return match[1]
