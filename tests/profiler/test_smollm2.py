"""A run on a real model, as the demo does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smollm2
from kvserve_api.profile_set import ParetoSet


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_end_to_end(tmp_path: Path) -> None:
    """Twelve trials without bundle and forecasts find what is known of this model: 8 bits are free, 2 are not."""
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "-m", "kvserve_profiler", "profile",
            "--model", str(smollm2.model_folder()), "--out", str(out), "--max-trials", "12",
            "--forecasts", "0",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "KVSERVE_CALIBRATION_TOKENS": "0"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = ParetoSet.parse((out / "pareto.json").read_bytes())
    assert result.provenance["trials"]["failed"] == {}
    profiles = {profile.name: profile for profile in result.profiles("default")}
    assert profiles["none"].ratio == pytest.approx(1, abs=1e-4)
    assert profiles["lossless"].ratio > 1.4
    assert profiles["none"].loss_upper_bp == profiles["lossless"].loss_upper_bp == 0.0
    # without a bundle, 8 bits a number are nearly free and a factor of 4 costs little
    assert any(p.loss_upper_bp < 10 and p.ratio > 1.8 for p in profiles.values())
    assert any(p.loss_upper_bp < 400 and p.ratio > 3.4 for p in profiles.values())
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[2:]]
    search = [trial for trial in trials if trial["phase"] == "search"]
    assert len(search) == 12
    for trial in trials:
        (quality,) = trial["measurement"]["qualities"].values()
        assert 0 <= quality["loss_bp"] <= quality["loss_upper_bp"]
        if quality["ratio"] > 8:
            assert quality["loss_bp"] > 100
    confirmed = {trial["name"] for trial in trials if trial["phase"] == "confirm"}
    assert set(profiles) <= confirmed
