"""Threads of a name get a share of a processor, on the kernel's own control groups."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster.errors import ClusterError
from testcluster.throttling import throttle

_ROOT = Path("/sys/fs/cgroup")
_CPU = _ROOT if (_ROOT / "cgroup.controllers").exists() else _ROOT / "cpu"
UID = "6f0c"
BURN = """
import threading, time
from kvserve_connector.threads import name_thread
def burn(name):
    name_thread(name)
    while True:
        pass
for name in ("coder", "other"):
    threading.Thread(target=burn, args=(name,), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(
    not os.access(_CPU, os.W_OK), reason="control groups can't be made here"
)


@pytest.fixture
def container() -> Iterator[tuple[str, int]]:
    """The name of an instance, and a process in the only container of a pod of it."""
    instance = f"kvtest{uuid.uuid4().hex[:6]}"
    group = _CPU / f"{instance}-n0" / f"pod{UID}" / "container"
    group.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (group / "cgroup.procs").write_text(str(process.pid))
    yield instance, process.pid
    process.kill()
    process.communicate()
    for folder in (group / "throttled", group, *group.parents[:2]):
        deadline_s = time.monotonic() + 5
        while folder.exists() and time.monotonic() < deadline_s:
            try:
                folder.rmdir()
            except OSError:
                # the kernel has not taken note of the process's end yet
                time.sleep(0.01)


def spent_s(pid: int, name: str) -> float:
    """Return the processor time of the thread of a name, in seconds."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return int((task / "schedstat").read_text().split()[0]) / 1e9
    raise AssertionError(name)


def share(pid: int, name: str, seconds: float = 1.0) -> float:
    """Return what a thread gets of a processor."""
    before_s, start_s = spent_s(pid, name), time.monotonic()
    time.sleep(seconds)
    return (spent_s(pid, name) - before_s) / (time.monotonic() - start_s)


def test_only_the_named_threads_are_slowed(container: tuple[str, int]) -> None:
    """A twentieth of a processor is what they get, until the limit is taken away."""
    instance, pid = container
    assert throttle(instance, UID, "coder", 0.05) == 1
    share(pid, "coder", 0.2)
    assert share(pid, "coder") < 0.1
    limit = next((_CPU / f"{instance}-n0").rglob("throttled"))
    assert str(pid) in (limit.parent / "cgroup.procs").read_text().split()
    throttle(instance, UID, "coder", 1.0)
    quota = limit / ("cpu.max" if _CPU == _ROOT else "cpu.cfs_quota_us")
    assert quota.read_text().split()[0] in ("-1", "max")


def test_what_is_not_there_is_told(container: tuple[str, int]) -> None:
    """A misspelt thread, another pod and a share too small are errors, not silence."""
    instance, _ = container
    for pod, thread, part, message in (
        (UID, "cdoer", 0.5, "no thread 'cdoer'"),
        ("ffff", "coder", 0.5, "no thread 'coder'"),
        (UID, "coder", 0.01, "at least 0.05"),
    ):
        with pytest.raises(ClusterError, match=message):
            throttle(instance, pod, thread, part)
