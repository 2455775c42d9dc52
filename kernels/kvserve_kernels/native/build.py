"""Building of the C library: ``python -m kvserve_kernels.native``. Standard library only; the wheel's hook uses it.

The file's name carries a digest of the sources and flags, so that a library never serves other sources than its own.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent
FLAGS: Final = (
    "-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-fno-plt", "-shared", "-Wl,-z,noexecstack",
)  # fmt: skip


class BuildError(Exception):
    """There is no library, and why."""


def digest() -> str:
    """Return the digest of sources and flags."""
    text = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        text.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return text.hexdigest()[:16]


def library_path() -> Path:
    """Return where the library of these sources is, or would be."""
    return SOURCES / f"_native-{digest()}.so"


def compile_to(target: Path, *more: str) -> None:
    """Compile the sources.

    Args:
        target: The library; replaced in one step.
        more: Further flags of the compiler.

    Raises:
        BuildError: This is not Linux, there is no compiler, or it failed.
    """
    if sys.platform != "linux":
        raise BuildError(f"no native code for {sys.platform}")
    wanted = os.environ.get("CC") or "gcc"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise BuildError(f"no C compiler: {wanted} is not there")
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [compiler, *FLAGS, *more, "-o", str(made), *sources],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise BuildError(f"{compiler} failed: {done.stderr[-2000:].strip()}")
            made.replace(target)
    except OSError as error:
        raise BuildError(str(error)) from error


def build() -> Path:
    """Compile the library beside its sources, unless it is there.

    Raises:
        BuildError: It can't be built.
    """
    path = library_path()
    if not path.exists():
        compile_to(path)
        for old in SOURCES.glob("_native-*.so"):
            if old != path:
                old.unlink(missing_ok=True)
    return path


def platform_tag() -> str:
    """Return the wheel's platform: only functions of glibc 2.14 and older are used."""
    machine = platform.machine()
    if platform.libc_ver()[0] == "glibc" and machine in ("x86_64", "aarch64"):
        return f"manylinux_2_17_{machine}"
    return f"linux_{machine}"
