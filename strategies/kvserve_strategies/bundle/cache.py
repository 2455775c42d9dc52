"""Bundles kept on this machine: files that are whole or not there, in a folder named by the bundle's digest."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

from kvserve_api.errors import ArtifactError
from kvserve_strategies.bundle.files import FileEntry

_PART: Final = ".part-"
_STALE_S: Final = 3600.0


def cache_root() -> Path | None:
    """Return where caches go, ``$KVSERVE_CACHE_DIR`` or the user's own; None if there is no such place."""
    root = os.environ.get("KVSERVE_CACHE_DIR")
    if root is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(base, "kvserve")
    # no home: a user that the container's image does not know
    return Path(root) if os.path.isabs(root) else None


class CacheFolder:
    """The cached files of one bundle; any number of processes may use it at once.

    Each file is written aside and renamed when it is whole, so that it is never seen half-written; two processes that
    fetch the same file put the same bytes in the same place.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, name: str) -> Self | None:
        """Return the folder of a bundle, which need not exist; None if there is no place for caches."""
        root = cache_root()
        if root is None:
            return None
        folder = cls(root / "bundles" / name)
        folder._sweep()
        return folder

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a file, cut after so many bytes; None if it is not there or can't be read."""
        try:
            with (self.path / name).open("rb") as file:
                return file.read(limit)
        except OSError:
            return None

    def holds(self, name: str, entry: FileEntry) -> bool:
        """Tell whether a file is there, undamaged."""
        try:
            with (self.path / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != entry.nbytes:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
        except OSError:
            return False

    def write(self, name: str, chunks: Iterable[bytes], entry: FileEntry) -> None:
        """Write a file if its bytes are those that the manifest lists.

        Raises:
            ArtifactError: They are others.
            OSError: It can't be written.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=_PART, dir=self.path)
        try:
            hasher, nbytes = hashlib.sha256(), 0
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    hasher.update(chunk)
                    nbytes += len(chunk)
                file.flush()
                os.fsync(file.fileno())
            if (nbytes, hasher.hexdigest()) != (entry.nbytes, entry.sha256):
                raise ArtifactError(
                    name, "is damaged in the store: remove the bundle there and put it anew"
                )
            os.replace(part, self.path / name)
        finally:
            Path(part).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they fetched."""
        for part in self.path.glob(f"{_PART}*"):
            try:
                if time.time() - part.stat().st_mtime > _STALE_S:
                    part.unlink()
            except OSError:
                continue
