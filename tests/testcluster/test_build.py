"""Building the cluster's binaries."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from testcluster import packages
from testcluster.build import (
    KUBE_NAMES,
    Target,
    build,
    build_target,
    go_version,
    locked,
    source_digest,
)
from testcluster.errors import ClusterError, UnavailableHereError
from testcluster.paths import SOURCE_DIR


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the Go modules."""
    for name in ("kube", "coredns", "pause"):
        shutil.copytree(SOURCE_DIR / name, tmp_path / name)
    return tmp_path


def test_digest_is_of_the_content(source: Path) -> None:
    """Two clones with the same modules share one build."""
    assert source_digest(source, "go1.26.8") == source_digest(SOURCE_DIR, "go1.26.8")


@pytest.mark.parametrize("file", ["kube/go.mod", "kube/go.sum", "coredns/main.go", "pause/main.go"])
def test_digest_changes_with_each_file(source: Path, file: str) -> None:
    """A changed module is never served from an old build."""
    before = source_digest(source, "go1.26.8")
    with (source / file).open("a") as module:
        module.write("\n// changed\n")
    assert source_digest(source, "go1.26.8") != before


def test_digest_changes_with_the_compiler() -> None:
    """A new compiler builds anew."""
    assert source_digest(SOURCE_DIR, "go1.26.8") != source_digest(SOURCE_DIR, "go1.26.9")


def test_build_target_runs_the_compiler(tmp_path: Path) -> None:
    """A module becomes a static program."""
    out = tmp_path / "out"
    out.mkdir()
    build_target(Target(name="pause", module="pause"), "go", out, lambda _: None)
    assert (out / "pause").read_bytes()[:4] == b"\x7fELF"


def test_build_target_says_what_the_compiler_says(tmp_path: Path) -> None:
    """A broken module gives the compiler's own words."""
    (tmp_path / "go.mod").write_text("module broken\n\ngo 1.26.0\n")
    (tmp_path / "main.go").write_text("package main\n\nfunc main() { missing() }\n")
    target = Target(name="broken", module=str(tmp_path))
    with pytest.raises(ClusterError, match="undefined: missing"):
        build_target(target, "go", tmp_path, lambda _: None)


def test_build_has_all_programs(request: pytest.FixtureRequest) -> None:
    """A finished build has every program of the cluster."""
    request.getfixturevalue("control_plane")
    names = {path.name for path in build().iterdir()}
    assert names == {"kube", "coredns", "pause", "helm", *KUBE_NAMES}


@pytest.mark.parametrize("version", ["go1.19.8", "go1.9", "nonsense", ""])
def test_old_compiler_is_refused(tmp_path: Path, version: str) -> None:
    """A compiler that is too old is named, with what is needed, before anything is built."""
    go = tmp_path / "go"
    go.write_text(f"#!/bin/sh\necho {version}\n")
    go.chmod(0o755)
    with pytest.raises(UnavailableHereError, match=f"Go >= 1.26, not: {version}"):
        go_version(str(go))


def test_packages_are_named_where_they_cannot_be_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without root the missing packages are named, with the command that installs them."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setitem(packages.PROBES, "no-such-package", "/no/such/file")
    with pytest.raises(UnavailableHereError, match=r"apt-get install .* no-such-package"):
        packages.install(lambda _: None)
    with pytest.raises(UnavailableHereError, match="missing: no-such-package;"):
        packages.require()


def test_lock_excludes_and_says_that_it_waits(tmp_path: Path) -> None:
    """The second builder waits for the first and says so."""
    waits: list[float] = []
    entered: list[float] = []

    def second() -> None:
        with locked(tmp_path / "lock", lambda: waits.append(time.monotonic())):
            entered.append(time.monotonic())

    with locked(tmp_path / "lock", lambda: waits.append(-1.0)):
        thread = threading.Thread(target=second)
        thread.start()
        while not waits:
            time.sleep(0.01)
        assert entered == []
        left_s = time.monotonic()
    thread.join(10)
    assert len(waits) == 1
    assert entered[0] >= left_s
