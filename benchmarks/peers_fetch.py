"""Get the code of peers to measure ours against: ``python benchmarks/peers_fetch.py`` prints where it lies.

Each package is downloaded as a wheel by pip, checked against a digest that is pinned here, and unpacked below
``build/peers``: nothing is installed, nothing of it is committed. Of LMCache the files of CacheGen are kept, which run
without what the package imports, and all of it beside, with what its server imports (see `store_lmcache`).
What is there is not downloaded again. The wheels are those of CPython 3.11 on x86-64 Linux, which the project's
environment runs on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parents[1] / "build" / "peers"


class FetchError(Exception):
    """A peer's code can't be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A package with a codec that runs on a CPU.

    Attributes:
        requirement: Name and version, as pip takes them.
        sha256: Of its wheel.
        licence: Under which its code is.
        members: The files to keep, by the beginning of their path; all if empty.
        whole: It is a package of which another entry keeps parts: its folder has another name.
    """

    requirement: str
    sha256: str
    licence: str
    members: tuple[str, ...] = ()
    whole: bool = False

    @property
    def folder(self) -> str:
        """The name of its folder, of its version."""
        return self.requirement.replace("==", "-") + ("-whole" if self.whole else "")


PEERS: Final[dict[str, Peer]] = {
    "lmcache": Peer(
        requirement="lmcache==0.5.6",
        sha256="14530ff72b96056e894c9b8dc70c10d019e7802799bbfde9cec298700b799194",
        licence="Apache-2.0",
        members=(
            "lmcache/storage_backend/serde/cachegen_",
            "lmcache/storage_backend/serde/serde.py",
            "lmcache/v1/platform/torch_ops/cachegen_kernels.py",
            "lmcache-0.5.6.dist-info/licenses/",
        ),
    ),
    "lmcache-whole": Peer(
        requirement="lmcache==0.5.6",
        sha256="14530ff72b96056e894c9b8dc70c10d019e7802799bbfde9cec298700b799194",
        licence="Apache-2.0",
        whole=True,
    ),
    "aiofile": Peer(
        requirement="aiofile==3.12.3",
        sha256="5c1bcc9e929c50834608e8cc1a4cc1d7503eb60c15a535b779fd39e2f372c017",
        licence="Apache-2.0",
    ),
    "aiofiles": Peer(
        requirement="aiofiles==25.1.0",
        sha256="abe311e527c862958650f9438e859c1fa7568a141b22abcd015e120e86a85695",
        licence="Apache-2.0",
    ),
    "caio": Peer(
        requirement="caio==0.12.10",
        sha256="b34a5483b987d207348ebbf86921bc42f08abcde833b91e0caa8760c7daa2f03",
        licence="Apache-2.0",
    ),
    "nvtx": Peer(
        requirement="nvtx==0.2.17",
        sha256="80fcb6fa62756ab012ddbe2d514757da060363ce6cd52fdfc840dcfe78b01d29",
        licence="Apache-2.0 WITH LLVM-exception",
    ),
    "sortedcontainers": Peer(
        requirement="sortedcontainers==2.4.0",
        sha256="a163dcaede0f1c021485e957a39245190e74249897e2ae4b2aa38595db237ee0",
        licence="Apache-2.0",
    ),
    "lmcache-turbo-quant-serde": Peer(
        requirement="lmcache-turbo-quant-serde==0.1.0",
        sha256="5111af8dc90c5f3ee4b53726f24b95630a810e802294bd91ec742542472aab1d",
        licence="Apache-2.0",
    ),
    "tqai": Peer(
        requirement="tqai==0.6.1",
        sha256="609bb0f1f5493844587dfd8789c35030926426b2d4e222e3b00a5e3f1666fd52",
        licence="MIT",
    ),
    "kakeyalattice": Peer(
        requirement="kakeyalattice==1.5.0",
        sha256="a35e519ba8bf11c7bca1d6a7311e62d72e73842a64d067f3369613149992062a",
        licence="MIT",
    ),
    "constriction": Peer(
        requirement="constriction==0.5.0",
        sha256="eb7909d0ad4940d3b74696d98f0dc16dec7294e57f9e0797bc06d5ce7b3b1507",
        licence="MIT OR Apache-2.0 OR BSL-1.0",
    ),
    "zstandard": Peer(
        requirement="zstandard==0.25.0",
        sha256="9300d02ea7c6506f00e627e287e0492a5eb0371ec1670ae852fefffa6164b072",
        licence="BSD-3-Clause",
    ),
}


def fetch(name: str) -> Path:
    """Return the folder with a peer's code, downloaded now if need be; to be put on ``sys.path``.

    Raises:
        FetchError: pip fails, or the file is not the one whose digest is pinned here.
    """
    peer = PEERS[name]
    target = FOLDER / peer.folder
    if target.is_dir():
        return target
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=FOLDER) as scratch:
        wheel = _download(peer, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                m for m in archive.namelist() if not peer.members or m.startswith(peer.members)
            ]
            archive.extractall(unpacked, wanted)
        try:
            os.rename(unpacked, target)
        except OSError:
            # another process was faster: a folder of this name is always complete
            shutil.rmtree(unpacked)
    return target


def _download(peer: Peer, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--python-version", "3.11", "--implementation", "cp",
        "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64",
        "--platform", "manylinux2014_x86_64", "--dest", str(folder), peer.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {peer.requirement}: {done.stderr.strip()[-500:] or 'no message'}"
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != peer.sha256:
        raise FetchError(f"{wheel.name} has sha256 {found}, expected {peer.sha256}: not used")
    return wheel


def main() -> int:
    """Fetch all peers and print their folders."""
    try:
        for name, peer in PEERS.items():
            print(f"{peer.requirement:34s} {peer.licence:30s} {fetch(name)}")
    except (FetchError, OSError, subprocess.TimeoutExpired) as error:
        print(f"peers_fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
