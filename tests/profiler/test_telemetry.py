"""What a run sends to a real OTLP receiver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from otlp_receiver import Receiver


@pytest.mark.slow
def test_a_run_is_one_trace_and_its_trials_are_counted(model_folder: Path, tmp_path: Path) -> None:
    """Each trial is a span below the run's, with its profile and outcome; the counter agrees."""
    with Receiver() as receiver:
        done = subprocess.run(
            [
                sys.executable, "-m", "kvserve_profiler", "profile", "--model", str(model_folder),
                "--out", str(tmp_path / "out"), "--max-trials", "3", "--forecasts", "0",
            ],
            env=os.environ
            | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert receiver.wait_for(
            lambda: len(receiver.spans) >= 4 and bool(receiver.points), timeout_s=10
        )
    (run,) = [span for span in receiver.spans if span.name == "kvserve.profile.run"]
    trials = [span for span in receiver.spans if span.name == "kvserve.profile.trial"]
    assert {span.parent_id for span in trials} == {run.span_id}
    assert {span.trace_id for span in trials} == {run.trace_id}
    names = [span.attributes["kvserve.profile"] for span in trials]
    assert names[:2] == ["none", "lossless"]
    # three in the search, and once more each to confirm it
    assert sorted(names[:3]) == sorted(names[3:])
    assert {span.attributes["kvserve.outcome"] for span in trials} == {"completed"}
    assert {span.service for span in receiver.spans} == {"kvserve-profiler"}
    (point,) = [point for point in receiver.points if point.name == "kvserve.profile.trials"]
    assert (point.value, point.unit) == (6, "{trial}")
    assert point.attributes == {"kvserve.outcome": "completed"}
