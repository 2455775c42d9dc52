"""What the tests of the test cluster share."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testcluster import cleanup, network, slots
from testcluster.layout import Layout
from testcluster.paths import SOURCE_DIR

_OWNER = """
import sys, time
from testcluster import ClusterSpec, start
cluster = start(ClusterSpec(nodes=int(sys.argv[1])))
print("ready", flush=True)
time.sleep(600)
"""

# where container programs keep sockets, namespaces and links unless kept from it
_RUNTIME_FOLDERS = ("/run/netns", "/run/containerd", "/opt/containerd", "/var/log/containers")


def _leftovers(layout: Layout) -> list[str]:
    """Name everything of an instance that is still on the machine."""
    found = [str(layout.run_dir)] if layout.run_dir.exists() else []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"{layout.run_dir}/" in words:
            found.append(f"process {words}")
    found += [str(m) for m in cleanup.mount_points() if m.is_relative_to(layout.run_dir)]
    found += [str(f) for f in cleanup.cgroup_folders(layout.name)]
    for command in (["ip", "-o", "link"], ["ip", "route"]):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found += [line for line in shown.splitlines() if f"{layout.name}" in line.split()]
        found += [line for line in shown.splitlines() if line.startswith(layout.subnet_prefix)]
        found += [line for line in shown.splitlines() if f" {layout.name}@" in line]
    return found


@pytest.fixture
def leftovers() -> Callable[[Layout], list[str]]:
    """A function that names everything of an instance that is still on the machine."""
    return _leftovers


@pytest.fixture
def host_state() -> Callable[[], dict[str, str]]:
    """A function that reads what a node could change on the whole machine."""

    def read() -> dict[str, str]:
        state = {name: (Path("/proc/sys") / name).read_text() for name in network.KUBELET_SYSCTLS}
        state["forward"] = Path("/proc/sys/net/ipv4/ip_forward").read_text()
        rules = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, check=False
        )
        state["rules"] = rules.stdout
        for folder in (*network.FIXED_FOLDERS, *map(Path, _RUNTIME_FOLDERS)):
            state[str(folder)] = " ".join(sorted(str(path) for path in folder.rglob("*")))
        return state

    return read


class Owner:
    """A process that owns an instance, to be killed."""

    def __init__(self, nodes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, str(nodes)],
            env={**os.environ, "PYTHONPATH": str(SOURCE_DIR)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        """Wait until the instance is ready."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def layout(self, nodes: int, timeout_s: float = 20.0) -> Layout:
        """Wait until the instance has a folder and return its layout."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            layout = _owned_by(self.process.pid)
            if layout is not None:
                assert layout.nodes == nodes
                return layout
            time.sleep(0.05)
        raise AssertionError("the instance never began")

    def close(self) -> None:
        """End the process and its pipe."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _owned_by(pid: int) -> Layout | None:
    """Return the instance that a process owns."""
    for instance in slots.instances():
        if instance.owner_pid == pid:
            document = json.loads((instance.run_dir / "instance.json").read_text())
            if "init_pid" in document:
                return Layout.load(instance.run_dir)
    return None


@pytest.fixture
def owner() -> Iterator[Callable[[int], Owner]]:
    """A function that starts a process which owns an instance; it is ended after the test."""
    started: list[Owner] = []

    def begin(nodes: int) -> Owner:
        started.append(Owner(nodes))
        return started[-1]

    yield begin
    for one in started:
        one.close()
