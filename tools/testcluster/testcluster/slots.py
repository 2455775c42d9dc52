"""Slots: one lock file for each instance, held by its guard process as long as it lives."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from testcluster.errors import ClusterError
from testcluster.layout import SLOTS, Layout
from testcluster.paths import state_dir
from testcluster.process import run


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """An instance as the lock files and its ``instance.json`` describe it.

    Attributes:
        slot: Its slot.
        run_dir: Its folder.
        alive: Whether its guard process holds the slot.
        guard_pid: The guard's process, 0 before it was written down.
        owner_pid: The process with which it ends, or None: it stays until ``down``.
        nodes: Number of nodes; 0 is a control plane alone.
    """

    slot: int
    run_dir: Path
    alive: bool
    guard_pid: int
    owner_pid: int | None
    nodes: int


def prepare_state_dir() -> Path:
    """Create the folder of instances and check that nobody else can write into it.

    Raises:
        ClusterError: It belongs to another user.
    """
    folder = state_dir()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise ClusterError(f"{folder} must be a folder that only user {os.geteuid()} can write")
    return folder


def run_dir_of(slot: int) -> Path:
    """Return the folder of the instance in a slot."""
    return state_dir() / str(slot)


def try_lock(slot: int) -> IO[str] | None:
    """Take a slot; return the open lock file, or None where a live instance has it."""
    file = (prepare_state_dir() / f"{slot}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def acquire(nodes: int, sweep: Callable[[Path], None]) -> tuple[Layout, IO[str]]:
    """Take the first slot whose ports and addresses nothing else uses.

    Args:
        nodes: Number of nodes of the instance to be.
        sweep: Removes what a dead instance left in its folder.

    Returns:
        The instance's layout, with an existing empty folder, and the lock to hold.

    Raises:
        ClusterError: All slots are in use.
    """
    for slot in range(SLOTS):
        lock = try_lock(slot)
        if lock is None:
            continue
        layout = Layout(slot=slot, run_dir=run_dir_of(slot), nodes=nodes)
        # what cannot be swept keeps its slot, and there are others
        with contextlib.suppress(ClusterError):
            if layout.run_dir.exists():
                sweep(layout.run_dir)
            if _is_free(layout):
                layout.run_dir.mkdir(mode=0o755)
                return layout, lock
        lock.close()
    raise ClusterError(
        f"all {SLOTS} slots for test clusters are in use: see `python -m testcluster status`"
    )


def instances() -> list[Instance]:
    """Return all instances that have a folder, dead ones included."""
    found = []
    for slot in range(SLOTS):
        run_dir = run_dir_of(slot)
        if not run_dir.is_dir():
            continue
        lock = try_lock(slot)
        alive = lock is None
        if lock is not None:
            lock.close()
        found.append(_read(slot, run_dir, alive=alive))
    return found


def sweep_dead(sweep: Callable[[Path], None]) -> int:
    """Remove what dead instances left behind; return how many there were.

    Raises:
        ClusterError: Something could not be removed; all else was.
    """
    count = 0
    failures: list[str] = []
    for slot in range(SLOTS):
        run_dir = run_dir_of(slot)
        if not run_dir.is_dir():
            continue
        lock = try_lock(slot)
        if lock is not None:
            with lock:
                if run_dir.is_dir():
                    count += 1
                    try:
                        sweep(run_dir)
                    except ClusterError as error:
                        failures.append(str(error))
    if failures:
        raise ClusterError("; ".join(failures))
    return count


def _read(slot: int, run_dir: Path, *, alive: bool) -> Instance:
    """Describe one instance; one that just begins has not written its file yet."""
    document: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((run_dir / "instance.json").read_text())
    guard_pid, owner_pid, nodes = (document.get(k) for k in ("guard_pid", "owner_pid", "nodes"))
    return Instance(
        slot=slot,
        run_dir=run_dir,
        alive=alive,
        guard_pid=guard_pid if isinstance(guard_pid, int) else 0,
        owner_pid=owner_pid if isinstance(owner_pid, int) else None,
        nodes=nodes if isinstance(nodes, int) else 0,
    )


def _is_free(layout: Layout) -> bool:
    """Return whether nothing on the machine uses the slot's ports, or its addresses if a node."""
    if layout.nodes:
        routes = run("ip", "-4", "route", "show").splitlines()
        return not any(line.startswith(f"{layout.subnet_prefix}.") for line in routes)
    return all(_can_bind(port) for port in layout.ports)


def _can_bind(port: int) -> bool:
    """Return whether a loopback port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
