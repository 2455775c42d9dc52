"""A KV store in a folder: a local disk, or a volume that several pods share."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvserve_api.errors import SpecError, UnavailableError, WireError, WireReason
from kvserve_connector.stores.store import Buffer, Stopwatch

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 4 << 20
_PART: Final = ".part"
_ABANDONED_S: Final = 600.0
"""An unfinished file that is older was left behind by a writer that died."""
_SPARE: Final = 0.9
"""Eviction leaves this share of the limit, so that not every write evicts."""


@dataclass(slots=True)
class FolderStore:
    """Files by key, written aside and renamed, so that a reader sees a whole one or none.

    A file's time of change is when it was written, its time of access when it was last read, whatever the mount does.
    Several processes may use one folder: each looks at what lies there before it evicts, so together they exceed the
    limit by no more than a sixteenth of it each.

    Attributes:
        root: The folder; made if it is not there.
        max_bytes: Most bytes of all files; the least recently used go first.
        ttl_s: Seconds after which a value has expired.
        fsync: Whether a value is on the disk before it can be seen. Without, a machine that crashes may leave files
            that are not whole; they are found by their checksums.
        now_s: The time of files, in seconds.
    """

    root: Path
    max_bytes: int
    ttl_s: float
    fsync: bool = False
    now_s: Callable[[], float] = time.time
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unseen_bytes: int = 0
    _seen_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.max_bytes > 0 or not self.ttl_s > 0:
            raise SpecError("stores.folder", "max_bytes and ttl_s must be positive")

    def get(self, key: str, *, max_bytes: int, timeout_s: float) -> bytearray | None:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        path = self._path(key)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self.now_s() - status.st_mtime >= self.ttl_s:
                    path.unlink(missing_ok=True)
                    return None
                if status.st_size > max_bytes:
                    raise WireError(
                        WireReason.TOO_LARGE,
                        f"a stored value of {status.st_size} bytes, most is {max_bytes}",
                    )
                value = bytearray(status.st_size)
                at = 0
                while at < len(value):
                    watch.check()
                    count = file.readinto(memoryview(value)[at : at + _READ_BYTES])
                    if not count:
                        # cut since it was opened: what is missing shows in its checksum
                        del value[at:]
                        break
                    at += count
                os.utime(file.fileno(), ns=(int(self.now_s() * 1e9), status.st_mtime_ns))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unavailable(self.root, error) from error
        return value

    def put(self, key: str, value: Buffer, *, timeout_s: float) -> None:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        path = self._path(key)
        view = memoryview(value).cast("B")
        if len(view) > self.max_bytes:
            raise UnavailableError(f"{len(view)} bytes do not fit into {self.root}")
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PART}")
        try:
            self._make_room(len(view))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with aside.open("xb", buffering=0) as file:
                    at = 0
                    while at < len(view):
                        watch.check()
                        at += file.write(view[at : at + _READ_BYTES]) or 0
                    if self.fsync:
                        os.fsync(file.fileno())
                now_ns = int(self.now_s() * 1e9)
                os.utime(aside, ns=(now_ns, now_ns))
                aside.replace(path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            if self.fsync:
                _sync_folder(path.parent)
        except OSError as error:
            raise _unavailable(self.root, error) from error

    def exists(self, keys: Sequence[str], *, timeout_s: float) -> frozenset[str]:
        """See `Store`."""
        watch = Stopwatch(timeout_s)
        found: set[str] = set()
        for key in keys:
            watch.check()
            try:
                if self.now_s() - self._path(key).stat().st_mtime < self.ttl_s:
                    found.add(key)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _unavailable(self.root, error) from error
        return frozenset(found)

    def delete(self, key: str, *, timeout_s: float) -> None:
        """See `Store`."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _unavailable(self.root, error) from error

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not all(part and part.replace("-", "").isalnum() and part.isascii() for part in parts):
            raise SpecError("key", f"must be letters, digits, - and /, got {key!r:.200}")
        return self.root.joinpath(*parts)

    def _make_room(self, nbytes: int) -> None:
        """Evict before a write that would exceed the limit, as far as is known here."""
        with self._lock:
            stale = self._unseen_bytes + nbytes > self.max_bytes // 16
            if self._seen_bytes is None or stale:
                files = list(self._files())
                self._seen_bytes = sum(size for _, _, size, _ in files)
                self._unseen_bytes = 0
                if self._seen_bytes + nbytes > self.max_bytes:
                    self._evict(files, nbytes)
            elif self._seen_bytes + self._unseen_bytes + nbytes > self.max_bytes:
                files = list(self._files())
                self._seen_bytes, self._unseen_bytes = sum(size for _, _, size, _ in files), 0
                self._evict(files, nbytes)
            self._unseen_bytes += nbytes

    def _evict(self, files: list[tuple[float, float, int, Path]], nbytes: int) -> None:
        """Remove what has expired, then what was used least recently."""
        assert self._seen_bytes is not None
        wanted = min(self.max_bytes * _SPARE, self.max_bytes - nbytes)
        now_s = self.now_s()
        for written_s, _, size, path in sorted(
            files, key=lambda file: (now_s - file[0] < self.ttl_s, file[1])
        ):
            if self._seen_bytes <= wanted and now_s - written_s < self.ttl_s:
                break
            path.unlink(missing_ok=True)
            self._seen_bytes -= size

    def _files(self) -> Iterator[tuple[float, float, int, Path]]:
        """Yield when each file was written and last used, its size and where it is; remove what writers left behind."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if name.endswith(_PART) and self.now_s() - status.st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)
                    continue
                yield status.st_mtime, status.st_atime, status.st_size, path


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unavailable(root: Path, error: OSError) -> UnavailableError:
    return UnavailableError(f"KV store {root}: {error.strerror or error}")
