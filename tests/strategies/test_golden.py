"""Today's code writes the bytes that were recorded, and reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_strategies import PRESETS, Expectation, Pipeline, decode_blob, encode_blob

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
CASES = pytest.mark.parametrize(
    "folder", FOLDERS, ids=[str(folder.relative_to(GOLDEN)) for folder in FOLDERS]
)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], bytes]:
    """Return a recording: its document, its tensors and its blob."""
    document = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, document["layout"]["dtype"])
    with np.load(folder / "input.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).view(dtype) for name in arrays.files}
    return document, tensors, (folder / "blob.bin").read_bytes()


def test_every_preset_has_recordings() -> None:
    """Each preset has one for each dtype."""
    assert (
        dict.fromkeys(PRESETS, 3).items()
        <= {name: len(list((GOLDEN / name).iterdir())) for name in PRESETS}.items()
    )


@CASES
def test_golden_bytes(folder: Path) -> None:
    """The same input gives the recorded bytes."""
    document, tensors, blob = load(folder)
    config = StrategyConfig.from_json(document["strategy"])
    assert config.digest == document["strategy_digest"]
    made = encode_blob(
        Pipeline.of(config),
        tensors["keys"],
        tensors["values"],
        model_fingerprint=document["model_fingerprint"],
        layout=KVLayout(**document["layout"]),
        layers=range(*document["layers"]),
        tokens=range(*document["tokens"]),
    )
    assert bytes(made) == blob


@CASES
def test_golden_values(folder: Path) -> None:
    """The recorded bytes give the recorded values, bit by bit."""
    document, tensors, blob = load(folder)
    expect = Expectation(
        model_fingerprint=document["model_fingerprint"],
        layout=KVLayout(**document["layout"]),
        layers=range(*document["layers"]),
        tokens=range(*document["tokens"]),
        max_bytes=len(blob),
    )
    decoded = decode_blob(blob, expect=expect)
    word = torch.int32 if decoded.keys.dtype == torch.float32 else torch.int16
    for name, tensor in (("keys", decoded.keys), ("values", decoded.values)):
        assert torch.equal(tensor.view(word), tensors[f"decoded_{name}"].view(word))


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["nehalem"])
def test_golden_on_other_processors(cpu: str, tmp_path: Path) -> None:
    """Machine code for processors with narrower registers writes and reads the same bytes."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": "",
        "KVSERVE_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
