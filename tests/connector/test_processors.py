"""How many processors there are to share."""

import os
from pathlib import Path

import pytest

from kvserve_connector.processors import processors

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        pytest.param("max 100000\n", ALLOWED, id="none"),
        pytest.param("50000 100000\n", 0.5, id="half"),
        pytest.param("100000000 100000\n", ALLOWED, id="more-than-there-are"),
        pytest.param("", ALLOWED, id="empty"),
        pytest.param("1 0\n", ALLOWED, id="odd"),
    ],
)
def test_container_limits_count(tmp_path: Path, limit: str, expected: float) -> None:
    """The lesser of what the thread may run on and what its container gets counts; what can't be read does not."""
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    assert processors(file) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    """Where there is no such file, only what the thread may run on limits it."""
    assert processors(tmp_path / "cpu.max") == ALLOWED
