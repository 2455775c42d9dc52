"""Builds the cluster's binaries with Go, once for each version of their source."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testcluster.errors import ClusterError, UnavailableHereError
from testcluster.paths import SOURCE_DIR, cache_dir

KUBE_VERSION = "v1.36.3"
HELM_VERSION = "v4.3.1"
KUBE_NAMES = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)

_GO_VERSION = (1, 26)
_VERSION_PACKAGE = "k8s.io/component-base/version"
_KUBE_FLAGS = (
    f"-X {_VERSION_PACKAGE}.gitVersion={KUBE_VERSION}"
    f" -X {_VERSION_PACKAGE}.gitMajor={KUBE_VERSION.lstrip('v').split('.')[0]}"
    f" -X {_VERSION_PACKAGE}.gitMinor={KUBE_VERSION.split('.')[1]}"
)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One binary.

    Attributes:
        name: File name below ``bin``.
        module: Folder of its main package below the source folder, or ``package@version``.
        ldflags: Flags for the linker beyond those that strip symbols.
        minutes: About how long it takes with a cold build cache on two cores.
    """

    name: str
    module: str
    ldflags: str = ""
    minutes: float = 0.1

    def command(self, go: str, out: Path) -> list[str]:
        """Return the Go command that writes the binary into folder ``out``."""
        flags = ["-v", "-trimpath", "-ldflags", f"-s -w {self.ldflags}".strip()]
        if "@" in self.module:
            return [go, "install", *flags, self.module]
        return [go, "build", *flags, "-o", str(out / self.name), "."]


TARGETS = (
    Target(name="kube", module="kube", ldflags=_KUBE_FLAGS, minutes=8),
    Target(name="coredns", module="coredns", minutes=1.5),
    Target(name="pause", module="pause"),
    Target(name="helm", module=f"helm.sh/helm/v4/cmd/helm@{HELM_VERSION}", minutes=1.5),
)


def say_to_stderr(text: str) -> None:
    """Print one line of progress."""
    print(f"testcluster: {text}", file=sys.stderr, flush=True)


def find_go() -> str:
    """Return the Go command.

    Raises:
        UnavailableHereError: There is none.
    """
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise UnavailableHereError("the test cluster is built with Go >= 1.26: put `go` on PATH")
    return go


def source_digest(source_dir: Path, go_version: str) -> str:
    """Return the name of a build: a digest of module files, targets and compiler."""
    digest = hashlib.sha256(go_version.encode())
    digest.update(repr(TARGETS).encode())
    names = {target.module for target in TARGETS if "@" not in target.module}
    for name in sorted(names):
        for path in sorted((source_dir / name).rglob("*")):
            if path.suffix in {".go", ".mod", ".sum"}:
                digest.update(f"{path.relative_to(source_dir)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock on a file; call ``waiting`` once if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(say: Say = say_to_stderr) -> Path:
    """Return the folder of binaries, building them first where that was never done.

    Any number of processes may call this at once; one builds, the others wait for it. The first
    build takes about ten minutes on two cores.

    Raises:
        UnavailableHereError: There is no Go, or it is too old.
        ClusterError: The build failed; the message ends with the compiler's last lines.
    """
    go = find_go()
    version = go_version(go)
    folder = cache_dir() / source_digest(SOURCE_DIR, version)
    bin_dir = folder / "bin"
    if bin_dir.is_dir():
        return bin_dir
    lock = cache_dir() / "build.lock"
    with locked(lock, lambda: say("another process builds the cluster's binaries: waiting")):
        if bin_dir.is_dir():
            return bin_dir
        say(f"building Kubernetes {KUBE_VERSION} with {version}: about 10 minutes the first time")
        work = folder / "bin.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        began_s = time.monotonic()
        for target in TARGETS:
            build_target(target, go, work, say)
        for name in KUBE_NAMES:
            (work / name).symlink_to("kube")
        work.rename(bin_dir)
        say(f"built in {time.monotonic() - began_s:.0f} s: {bin_dir}")
    return bin_dir


def go_version(go: str) -> str:
    """Return the version of the compiler that the module asks for, fetched by Go if necessary."""
    run = subprocess.run(
        [go, "env", "GOVERSION"],
        cwd=SOURCE_DIR / "kube",
        capture_output=True,
        text=True,
        check=False,
    )
    version = run.stdout.strip()
    number = re.match(r"go(\d+)\.(\d+)", version)
    if run.returncode != 0 or number is None or tuple(map(int, number.groups())) < _GO_VERSION:
        said = run.stderr.strip() or version
        raise UnavailableHereError(f"the test cluster is built with Go >= 1.26, not: {said}")
    return version


def build_target(target: Target, go: str, out: Path, say: Say) -> None:
    """Build one binary into ``out``, with a line of progress every ten seconds."""
    cwd = out if "@" in target.module else SOURCE_DIR / target.module
    env = {**os.environ, "CGO_ENABLED": "0", "GOBIN": str(out), "GOFLAGS": "-buildvcs=false"}
    began_s = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        target.command(go, out), cwd=cwd, env=env, text=True, stderr=subprocess.PIPE
    ) as process:
        reader = threading.Thread(target=_collect, args=(process, lines), daemon=True)
        reader.start()
        said_s = began_s
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - said_s > 10:
                said_s = time.monotonic()
                say(
                    f"{target.name}: {said_s - began_s:.0f} s of about {target.minutes * 60:.0f} s,"
                    f" {len(lines)} packages"
                )
        reader.join()
    if process.returncode != 0:
        last = "".join(lines[-20:])
        raise ClusterError(f"building {target.name} failed; the compiler's last lines:\n{last}")
    say(f"{target.name}: built in {time.monotonic() - began_s:.0f} s")


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Append each line of the process's stderr."""
    assert process.stderr is not None
    lines.extend(process.stderr)
