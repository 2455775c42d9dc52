"""Starts instances: asks a guard process for one and waits until it is ready."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from testcluster import build, packages
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError, UnavailableHereError
from testcluster.layout import Layout
from testcluster.paths import SOURCE_DIR
from testcluster.process import system_env
from testcluster.slots import Instance, run_dir_of

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """What to start.

    Attributes:
        nodes: 0 is a control plane alone, which needs no root; 1 to 8 are full nodes.
        detached: Whether it outlives this process, until ``down``.
        keep_logs: A folder into which its logs are copied when it ends.
    """

    nodes: int = 0
    detached: bool = False
    keep_logs: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.nodes <= 8:
            raise ClusterError(f"nodes: must be from 0 to 8, got {self.nodes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a ready instance says about itself.

    Attributes:
        slot: Its slot.
        started_s: How long it took to start, in seconds.
    """

    slot: int
    started_s: float


def start(spec: ClusterSpec) -> Cluster:
    """Start an instance and wait until it is ready; build its binaries first if necessary.

    Unless detached, it ends with this process, even when that is killed; call ``stop`` to end it
    earlier, or use the result in a ``with`` statement.

    Raises:
        UnavailableHereError: This machine cannot run it.
        ClusterError: It did not start; the message ends with its logs' last lines.
    """
    check_machine(spec)
    bin_dir = build.build()
    request = {
        "nodes": spec.nodes,
        "owner_pid": None if spec.detached else os.getpid(),
        "bin_dir": str(bin_dir),
        "keep_logs": str(spec.keep_logs.resolve()) if spec.keep_logs else None,
    }
    guard = subprocess.Popen(
        [sys.executable, "-m", "testcluster.guard", json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd="/",
        env={**system_env(), "PYTHONPATH": str(SOURCE_DIR)},
        start_new_session=True,
    )
    try:
        report = _read_report(guard)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            guard.terminate()
        guard.wait(60)
        raise
    layout = Layout(slot=report.slot, run_dir=run_dir_of(report.slot), nodes=spec.nodes)
    return Cluster(
        kubeconfig=layout.kubeconfig,
        bin_dir=bin_dir,
        layout=layout,
        guard=None if spec.detached else guard,
        started_s=report.started_s,
    )


def check_machine(spec: ClusterSpec) -> None:
    """Check what can be checked at once: operating system, root, packages.

    Raises:
        UnavailableHereError: With what is missing.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        raise UnavailableHereError("the test cluster runs on Linux >= 5.3 only")
    if not spec.nodes:
        return
    if os.geteuid() != 0:
        raise UnavailableHereError(
            "a full node needs root: run as root, or use a cluster of your own with KUBECONFIG"
            " and KVSERVE_EXISTING_CLUSTER=1"
        )
    packages.require()
    for command in ("unshare", "nsenter"):
        if shutil.which(command) is None:
            raise UnavailableHereError(f"`{command}` is missing: install util-linux")


def _read_report(guard: subprocess.Popen[bytes]) -> Report:
    """Return the one line that the instance writes when it is ready.

    Raises:
        ClusterError: It failed, or said nothing in time.
    """
    assert guard.stdout is not None
    data = b""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    with guard.stdout as pipe:
        while not data.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise ClusterError(f"the cluster was not ready after {_START_TIMEOUT_S:.0f} s")
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk:
                raise ClusterError("the cluster's guard process ended without a word")
            data += chunk
    document = json.loads(data)
    if "error" in document:
        raise ClusterError(document["error"])
    return Report(**document)


def attach(instance: Instance) -> Cluster:
    """Return a live instance that another process started.

    Raises:
        ClusterError: It is not alive, or not ready yet.
    """
    layout = Layout.load(instance.run_dir)
    if not (instance.alive and layout.kubeconfig.exists()):
        raise ClusterError(f"instance {instance.slot} is not running")
    return Cluster(kubeconfig=layout.kubeconfig, bin_dir=build.build(), layout=layout)


def stop_instance(instance: Instance) -> None:
    """End a live instance that another process started and wait until nothing of it is left.

    Raises:
        ClusterError: It did not end in time.
    """
    try:
        guard = os.pidfd_open(instance.guard_pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(guard, signal.SIGTERM)
        if not select.select([guard], [], [], _STOP_TIMEOUT_S)[0]:
            raise ClusterError(f"instance {instance.slot} did not end in {_STOP_TIMEOUT_S:.0f} s")
    finally:
        os.close(guard)
