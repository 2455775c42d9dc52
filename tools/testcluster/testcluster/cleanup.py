"""Removes what an instance leaves on the machine once its processes are gone."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from testcluster.errors import ClusterError
from testcluster.layout import Layout
from testcluster.process import run

_CGROUPS = Path("/sys/fs/cgroup")
_REMOVE_TIMEOUT_S = 10.0


def clean(layout: Layout, keep_logs: Path | None = None) -> None:
    """Remove an instance: link, mounts, control groups and, last, its folder.

    Args:
        layout: The instance; its first process has ended.
        keep_logs: A folder to which its logs are copied before.

    Raises:
        ClusterError: Something is still mounted below its folder, which is then left alone.
    """
    if keep_logs is not None and layout.log_dir.is_dir():
        shutil.copytree(layout.log_dir, keep_logs, dirs_exist_ok=True, symlinks=True)
    if layout.nodes:
        _remove_link(layout.name)
        _remove_cgroups(layout.name)
    remove_folder(layout.run_dir)


def sweep(run_dir: Path) -> None:
    """Remove what a dead instance left; the caller holds its slot."""
    try:
        layout = Layout.load(run_dir)
    except (OSError, ValueError, KeyError):
        remove_folder(run_dir)
        return
    clean(layout)


def remove_folder(folder: Path) -> None:
    """Delete a folder unless something is mounted below it.

    A mount there may be a bind mount of the user's own files, which must not be deleted.

    Raises:
        ClusterError: Something is still mounted, or a file cannot be deleted.
    """
    for mount in reversed([m for m in mount_points() if m.is_relative_to(folder)]):
        with contextlib.suppress(ClusterError):
            run("umount", "-l", str(mount))
    left = [m for m in mount_points() if m.is_relative_to(folder)]
    if left:
        raise ClusterError(f"{left[0]} is still mounted: unmount it and try again")
    deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S
    while True:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            # a killed process may still be on its way out and write a last file
            if time.monotonic() > deadline_s:
                raise ClusterError(f"{folder} cannot be deleted: {error}") from error
            time.sleep(0.1)
        else:
            return


def mount_points() -> Iterator[Path]:
    """Yield this process's mount points, outer before inner."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield Path(line.split(" ")[4].encode().decode("unicode_escape"))


def cgroup_folders(prefix: str) -> list[Path]:
    """Return an instance's control groups, in all hierarchies, outermost only."""
    found = []
    for hierarchy in [_CGROUPS, *_CGROUPS.glob("*/")]:
        found += [f for f in hierarchy.glob(f"{prefix}-*") if f.is_dir() and not f.is_symlink()]
    return found


def _remove_link(name: str) -> None:
    """Delete the link to the instance's network namespace, if it still exists."""
    with contextlib.suppress(ClusterError):
        run("ip", "link", "delete", name)


def _remove_cgroups(prefix: str) -> None:
    """Delete an instance's control groups, killing what is still in them."""
    deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S
    while folders := cgroup_folders(prefix):
        for folder in folders:
            for inner, _, _ in os.walk(folder, topdown=False):
                _kill_members(Path(inner))
                with contextlib.suppress(OSError):
                    os.rmdir(inner)
        if time.monotonic() > deadline_s:
            raise ClusterError(f"{folders[0]}: the control group cannot be removed")
        time.sleep(0.02)


def _kill_members(folder: Path) -> None:
    """Kill the processes of one control group."""
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
