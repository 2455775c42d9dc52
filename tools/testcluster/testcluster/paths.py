"""Where the test cluster keeps what it builds and what it runs."""

import os
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parents[1]
"""The folder of the Go modules (``kube``, ``coredns``, ``pause``) and of this package."""

CLONE_DIR = SOURCE_DIR.parents[1]
"""The root of the repository."""


def cache_dir() -> Path:
    """Return the folder for built binaries, outside the clone and shared by all clones."""
    named = os.environ.get("KVSERVE_CACHE_DIR")
    if named:
        return Path(named).expanduser().resolve() / "testcluster"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "kvserve" / "testcluster"


def state_dir() -> Path:
    """Return the folder of running instances: one for each user, on a disk and not a tmpfs.

    Containers' root file systems live below it, and the paths of its sockets must stay short
    (107 characters), so it is neither in the cache nor in the user's temporary folder.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/kvserve-testcluster")
    return Path(f"/var/tmp/kvserve-testcluster-{os.geteuid()}")
