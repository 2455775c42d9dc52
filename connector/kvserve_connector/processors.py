"""How many processors this process may use."""

import os
from pathlib import Path
from typing import Final

QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
"""Of control groups, version 2: microseconds of processor time in so many of time, or ``max``."""


def processors(quota: Path = QUOTA) -> float:
    """Return the processors that the calling thread may run on, or fewer where its container has less time.

    Args:
        quota: File with the container's limit; without it there is none.
    """
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        granted, period = quota.read_text().split()
        return min(allowed, int(granted) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return allowed
