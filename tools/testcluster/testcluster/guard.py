"""The guard: a small process that stands above an instance and cleans up after it.

It ends the instance when its owner ends (for whatever reason: it watches the owner's process), on
SIGTERM, or when the instance fails. If the guard itself is killed, the kernel kills the instance's
first process with it, and what is left on disk is swept by the next ``up``.

Not for import by others: ``launch`` runs it as ``python -m testcluster.guard REQUEST``.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from testcluster import cleanup, slots
from testcluster.errors import ClusterError
from testcluster.layout import Layout
from testcluster.process import adopt_orphans, die_with_parent, wait_for_children

_NAMESPACES = (
    "unshare",
    "--net",
    "--mount",
    "--propagation=private",
    "--pid",
    "--fork",
    "--kill-child=SIGKILL",
    "--mount-proc",
)


def main() -> None:
    """Run one instance until it has to end, then remove all of it."""
    request = json.loads(sys.argv[1])
    owner_pid = request["owner_pid"]
    adopt_orphans()
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    watched = [stop_read]
    if owner_pid is not None:
        watched.append(os.pidfd_open(owner_pid))
        if os.getppid() != owner_pid:
            raise SystemExit("the owner ended before the guard began")
    # another's leftovers must not keep this instance from starting
    with contextlib.suppress(ClusterError):
        slots.sweep_dead(cleanup.sweep)
    try:
        layout, lock = slots.acquire(request["nodes"], cleanup.sweep)
    except ClusterError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from error
    with lock:
        known = {"guard_pid": os.getpid(), "owner_pid": owner_pid}
        layout.save(**known)
        process = _start(layout, request)
        layout.save(**known, init_pid=process.pid)
        _drop_stdout()
        exited = os.pidfd_open(process.pid)
        select.select([*watched, exited], [], [])
        process.kill()
        process.wait()
        wait_for_children()
        keep = request["keep_logs"]
        cleanup.clean(layout, keep_logs=Path(keep) if keep else None)


def _start(layout: Layout, request: dict[str, object]) -> subprocess.Popen[bytes]:
    """Start the instance's first process, in namespaces of its own if it has a node."""
    command = [sys.executable, "-m", "testcluster.init", str(layout.run_dir), json.dumps(request)]
    host_network = os.open("/proc/self/ns/net", os.O_RDONLY)
    if layout.nodes:
        command = [*_NAMESPACES, *command, f"/proc/1/fd/{host_network}"]
    layout.log_dir.mkdir()
    with (layout.log_dir / "init.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[host_network],
            preexec_fn=die_with_parent,
        )
    os.close(host_network)
    return process


def _drop_stdout() -> None:
    """Leave the pipe to the owner to the first process, so that it closes when that is done."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


if __name__ == "__main__":
    main()
