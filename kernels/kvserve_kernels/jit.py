"""Compilation of CPU kernels, with a cache on disk that survives the process.

numba's own default writes beside the source, which is read-only in an image. Machine code is kept in
``$KVSERVE_CACHE_DIR/numba/<digest of the sources>`` instead (by default ``~/.cache/kvserve``), and not kept at all
where that can't be written. The digest is there because numba does not notice a change in a function that another one
calls.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile a function on its first call for each signature; it runs without the interpreter lock."""
    folder = _cache_folder()
    if folder is None:
        return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    # numba reads the folder while it decorates; vLLM uses numba too, so its setting must not change
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = before


def inline(function: F) -> F:
    """Compile a helper that is always merged into the kernel that calls it."""
    return numba.njit(nogil=True, inline="always", error_model="numpy")(function)  # type: ignore[no-any-return]


@cache
def _cache_folder() -> Path | None:
    """Return a folder of ours for machine code, or None if there is nowhere to write."""
    root = os.environ.get("KVSERVE_CACHE_DIR")
    if root is None:
        home = os.path.expanduser("~")
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
        root = os.path.join(base, "kvserve")
    if not os.path.isabs(root):
        # no home: a user that the container's image does not know
        return None
    digest = hashlib.sha256(f"{sys.version_info[:2]}{numba.__version__}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    folder = Path(root) / "numba" / digest.hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    # what lies in a cache is run: a folder that others can write to must not be trusted
    status = folder.stat()
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if ours and os.access(folder, os.W_OK) else None
