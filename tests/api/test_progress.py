"""The progress of a profiling run."""

import json

import pytest

from kvserve_api.errors import SpecError
from kvserve_api.progress import Progress


def test_progress() -> None:
    """Progress reads back equal and counts failures as done."""
    progress = Progress(completed=30, failed=7, total=64, message="int4")
    assert Progress.parse(json.dumps(progress.to_json())) == progress
    assert str(progress) == "37/64"
    with pytest.raises(SpecError, match="completed"):
        Progress.parse('{"completed": -1, "failed": 0, "total": 1}')
