"""Limits how much processor time some threads of a pod get, and nothing else of it.

The threads are found by the name that the kernel knows them by, and put into a control group below their container's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from testcluster.errors import ClusterError

_CGROUPS: Final = Path("/sys/fs/cgroup")
_NAME: Final = "throttled"
_PERIOD_US: Final = 20_000
"""Short, so that work of a few milliseconds is slowed as evenly as that of seconds."""
_LEAST_US: Final = 1_000
"""What the kernel accepts as a quota."""


def throttle(instance: str, pod_uid: str, thread: str, share: float) -> int:
    """Give the threads of a name in a pod a share of one processor, all together.

    Args:
        instance: Name of the cluster's instance, with which the control groups of its nodes begin.
        pod_uid: The pod.
        thread: The threads' name as the kernel has it.
        share: Of a processor, from 0.05; 1 or more takes the limit away.

    Returns:
        How many threads it is about.

    Raises:
        ClusterError: The pod has no thread of this name, or the share is too small.
    """
    if share * _PERIOD_US < _LEAST_US:
        raise ClusterError(f"a share must be at least {_LEAST_US / _PERIOD_US}, got {share}")
    unified = (_CGROUPS / "cgroup.controllers").exists()
    found = [
        (container, task)
        for container in _containers(instance, pod_uid, unified)
        for task in _threads(container, thread)
    ]
    if not found:
        raise ClusterError(f"pod {pod_uid} has no thread {thread!r}")
    for container, task in found:
        group = container / _NAME
        if not group.exists():
            _create(group, unified)
        _limit(group, share, unified)
        (group / ("cgroup.threads" if unified else "tasks")).write_text(str(task))
    return len(found)


def _containers(instance: str, pod_uid: str, unified: bool) -> Iterator[Path]:
    """Yield the control groups of a pod's containers."""
    root = _CGROUPS if unified else _CGROUPS / "cpu"
    for folder in root.glob(f"{instance}-n*"):
        for pod in folder.rglob(f"*{pod_uid}*"):
            yield from (inner for inner in pod.iterdir() if inner.is_dir())


def _threads(group: Path, name: str) -> Iterator[int]:
    """Yield the threads of a name among those of a group's processes."""
    for pid in (group / "cgroup.procs").read_text().split():
        for comm in Path(f"/proc/{pid}/task").glob("*/comm"):
            try:
                if comm.read_text().rstrip("\n") == name:
                    yield int(comm.parent.name)
            except (FileNotFoundError, ProcessLookupError):
                # it ended meanwhile
                continue


def _create(group: Path, unified: bool) -> None:
    group.mkdir()
    if unified:
        (group / "cgroup.type").write_text("threaded")
        (group.parent / "cgroup.subtree_control").write_text("+cpu")


def _limit(group: Path, share: float, unified: bool) -> None:
    quota_us = round(share * _PERIOD_US) if share < 1 else None
    if unified:
        (group / "cpu.max").write_text(f"{quota_us or 'max'} {_PERIOD_US}")
        return
    (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(quota_us or -1))
