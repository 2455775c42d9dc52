"""Output in a folder: the log grows line by line, and files appear whole."""

import json
from pathlib import Path

import pytest

from kvserve_api.errors import SpecError
from kvserve_profiler.folder import RunFolder
from kvserve_profiler.trials import Trial, TrialLog
from kvserve_strategies.presets import PRESETS


def test_a_log_is_appended_to_and_repaired(tmp_path: Path) -> None:
    """Each save adds the new lines only; a line cut by a kill is gone after the next start."""
    first = Trial(name="none", strategy=PRESETS["none"], duration_s=1.0, error="a")
    second = Trial(name="fp8", strategy=PRESETS["fp8"], duration_s=1.0, error="b")
    log = TrialLog(basis={"seed": 0})
    folder = RunFolder(tmp_path / "new" / "out")
    assert folder.load() == ""
    folder.save(log)
    folder.save(log.plus(first))
    folder.log_path.write_text(folder.load() + '{"name": "cut')
    again = RunFolder(tmp_path / "new" / "out")
    resumed = log.resume(again.load())
    assert resumed.trials == (first,)
    again.save(resumed)
    inode = again.log_path.stat().st_ino
    again.save(resumed.plus(second))
    assert again.log_path.stat().st_ino == inode
    names = [json.loads(line).get("name") for line in again.load().splitlines()]
    assert names == [None, "none", "fp8"]


def test_a_file_in_the_way_is_bad_input(tmp_path: Path) -> None:
    """An output folder that can't be made is a named error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="can't make"):
        RunFolder(tmp_path / "file" / "out")
