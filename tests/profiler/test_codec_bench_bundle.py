"""Where the bundle of a model that is only measured is kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvserve_api.errors import SpecError
from kvserve_profiler.codec_bench_bundle import bundle_folder, calibrated_folder
from kvserve_profiler.codec_bench_cli import bench
from kvserve_strategies.peers import PEERS
from kvserve_strategies.presets import joint
from kvserve_strategies.stages import Grid

OTHER_WIDTH = joint(layers=2, heads=0, quantiser=Grid(step=0.5, dead_zone=1.0))


def test_a_bundle_is_kept_for_what_it_was_made_of(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model and bases have one folder; other weights, another configuration or another basis another one."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    first = bundle_folder(model, [])
    assert first.parent == tmp_path / "cache" / "calibrations"
    assert first.name.startswith("model-")
    assert bundle_folder(model, [PEERS["kivi-3"]]) == first

    folders = {first, bundle_folder(model, [OTHER_WIDTH])}
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    folders.add(bundle_folder(model, []))
    (model / "config.json").write_text("{}")
    folders.add(bundle_folder(model, []))
    assert len(folders) == 4


def test_a_bundle_that_is_there_is_used(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is calibrated, and nothing is said, if the folder exists."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path))
    folder = bundle_folder(model_folder, [])
    folder.mkdir(parents=True)
    said: list[str] = []
    assert calibrated_folder(model_folder, [], said.append) == folder
    assert said == []


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """Weights that are not safetensors are never read."""
    with pytest.raises(SpecError, match="no \\*\\.safetensors"):
        bundle_folder(tmp_path, [])


@pytest.mark.slow
def test_a_strategy_that_needs_a_bundle_calibrates_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --bundle the model is calibrated with the bases that are needed; the next run finds what was made."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path))
    text, strategy = tmp_path / "text.txt", tmp_path / "kvtc.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    strategy.write_text(json.dumps(PEERS["kvtc"].to_json()))
    arguments = ["codec", "--model", model_folder, "--text", text, "--strategy", strategy]
    arguments += ["--prefix", "48", "--continuation", "16", "--repeats", "1", "--json"]
    first, second = (CliRunner().invoke(bench, [str(x) for x in arguments]) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert "calibrating" in first.stderr
    assert "calibrating" not in second.stderr
    (row,), (again,) = (json.loads(run.stdout) for run in (first, second))
    assert row["bytes_wire"] == again["bytes_wire"]
    assert row["ratio"] > 1
    assert 0 < row["kl"] < 1
    (folder,) = (tmp_path / "calibrations").iterdir()
    options = ["--bundle", str(folder)]
    given = CliRunner().invoke(bench, [str(x) for x in [*arguments, *options]])
    assert json.loads(given.stdout)[0]["bytes_wire"] == row["bytes_wire"]
