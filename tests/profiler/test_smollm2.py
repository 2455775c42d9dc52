"""A run on a real model, as the demo does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smollm2
from kvserve_api.profile_set import ParetoSet


@pytest.mark.slow
def test_smollm2_end_to_end(tmp_path: Path) -> None:
    """Sixteen presets without a bundle take at most two CPU-minutes; ratios and losses are as known for this model."""
    out = tmp_path / "out"
    before = os.times()
    done = subprocess.run(
        [
            sys.executable, "-m", "kvserve_profiler", "profile",
            "--model", str(smollm2.model_folder()), "--out", str(out), "--max-trials", "16",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "KVSERVE_CALIBRATION_TOKENS": "0"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    after = os.times()
    assert done.returncode == 0, done.stderr
    spent_s = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    assert spent_s < 120
    result = ParetoSet.parse((out / "pareto.json").read_bytes())
    assert result.provenance["trials"]["failed"] == {}
    lines = (out / "trials.jsonl").read_text().splitlines()[1:]
    quality = {}
    for line in lines:
        trial = json.loads(line)
        (quality[trial["name"]],) = trial["measurement"]["qualities"].values()
    # from the numbers of bits: headers and bounds cost a little of 16/8 and 16/4
    assert 0.9999 < quality["none"]["ratio"] < 1.0
    assert 1.8 < quality["int8-token"]["ratio"] < 2.0
    assert 3.4 < quality["int4-token"]["ratio"] < 4.0
    assert quality["lossless"]["ratio"] > 1.4
    # as research measured on this model with other text: 8 bits cost nothing, 4 bits little, 2 bits much
    assert quality["none"]["loss_bp"] == quality["lossless"]["loss_bp"] == 0.0
    assert quality["int8-token"]["loss_upper_bp"] < 5
    assert 20 < quality["kivi-4"]["loss_bp"] < quality["int4-token"]["loss_bp"] < 300
    assert quality["kivi-2"]["loss_bp"] > 1000
    assert all(q["loss_bp"] <= q["loss_upper_bp"] for q in quality.values())
    assert {p.name for p in result.profiles("default")} >= {"none", "lossless", "kivi-4"}
