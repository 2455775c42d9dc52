"""What is kept of a truth that is being measured."""

from pathlib import Path

import pytest

from kvserve_api.errors import ArtifactError
from profiler_log import Log
from profiler_table import Row


def row(name: str) -> Row:
    """Return a row of one window."""
    return Row(
        name=name,
        digest="0" * 16,
        ratio=2.0,
        encode_s=0.1,
        decode_s=0.1,
        evaluation_s=0.5,
        kl=((0.25, 0.5),),
        forecast=((0.25, 0.5),),
    )


def test_shards_see_each_others_rows_and_no_half_ones(tmp_path: Path) -> None:
    """Two shards write one file; a line that a kill cut short is measured again, and the one after it is not lost."""
    path = tmp_path / "truth.jsonl"
    one, other = (Log(path, {"seed": 0}) for _ in range(2))
    one.add(row("a"))
    with path.open("a") as file:
        file.write('\n{"name": "b", "digest":')
    other.add(row("c"))
    one.read()
    assert one.rows == {"a": row("a"), "c": row("c")}


def test_rows_of_another_measurement_are_refused(tmp_path: Path) -> None:
    """Rows that were measured with other settings don't get into a table."""
    path = tmp_path / "truth.jsonl"
    Log(path, {"seed": 0}).add(row("a"))
    with pytest.raises(ArtifactError, match="remove it to begin anew"):
        Log(path, {"seed": 1})
