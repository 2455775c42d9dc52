"""The Debian packages that a full node needs beyond what the build gives."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from testcluster.errors import UnavailableHereError

PROBES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "nftables": "nft",
    "iproute2": "tc",
    "libnuma1": "/usr/lib/x86_64-linux-gnu/libnuma.so.1",
}
"""Package name to a command or file that it brings. libnuma1 is vLLM's, in pods that mount /usr."""


def missing() -> list[str]:
    """Return the names of packages that are not installed."""
    return [package for package, probe in PROBES.items() if not _present(probe)]


def require() -> None:
    """Check that all packages are there.

    Raises:
        UnavailableHereError: Naming those that are not, and the command that installs them.
    """
    names = missing()
    if names:
        raise UnavailableHereError(
            f"Debian packages are missing: {' '.join(names)}; install them with"
            " `python -m testcluster build` (as root) or `apt-get install`"
        )


def install(say: Callable[[str], None]) -> None:
    """Install what is missing with apt-get.

    Raises:
        UnavailableHereError: Not root, no apt-get, or apt-get failed; names the packages.
    """
    names = missing()
    if not names:
        return
    wanted = " ".join(names)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise UnavailableHereError(
            f"a full node needs these Debian packages: {wanted}; root can install them with"
            f" `apt-get install --no-install-recommends {wanted}`"
        )
    say(f"installing Debian packages: {wanted}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-q", "-y", "--no-install-recommends", *names],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableHereError(
                f"`{' '.join(command)}` failed with {done.returncode}: {done.stderr.strip()}"
            )


def _present(probe: str) -> bool:
    """Return whether a file exists or a command is found; sbin counts as well."""
    if probe.startswith("/"):
        return Path(probe).exists()
    return shutil.which(probe, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None
