"""Today's code writes the bytes that were recorded, and reads them.

Without calibration it reads the very values, too. What a calibrated transform gives back is a sum whose order differs
between processors: there it is held to the last place of bfloat16, in which its factors are.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvserve_api.strategy import StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_kernels.native import Simd, coder
from kvserve_strategies import PRESETS, Expectation, Pipeline, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.peers import PEERS
from kvserve_strategies.registry import STAGES

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))


def cases(folders: list[Path]) -> pytest.MarkDecorator:
    """Return a test's cases."""
    names = [str(folder.relative_to(GOLDEN)) for folder in folders]
    return pytest.mark.parametrize("folder", folders, ids=names)


def is_written(folder: Path) -> bool:
    """Tell whether the encoder still writes a recording; those of earlier ones are only read."""
    return "read_only" not in json.loads((folder / "config.json").read_text())


def load(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], bytes]:
    """Return a recording: its document, its tensors and its blob."""
    document = json.loads((folder / "config.json").read_text())
    dtype = getattr(torch, document["layout"]["dtype"])
    with np.load(folder / "input.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).view(dtype) for name in arrays.files}
    return document, tensors, (folder / "blob.bin").read_bytes()


@cache
def bundle() -> Bundle:
    """Return the bundle of the calibrated recordings."""
    return Bundle.open(GOLDEN / "bundle")


def test_every_strategy_has_recordings() -> None:
    """Each preset and restated peer that needs no calibration has one for each dtype."""
    wanted = [name for name, c in {**PRESETS, **PEERS}.items() if not Pipeline.of(c).calibrated]
    recorded = Counter(folder.parent.name for folder in FOLDERS)
    assert {name: recorded[name] for name in wanted} == dict.fromkeys(wanted, 3)


def test_every_stage_has_recordings() -> None:
    """Each registered stage is in a recording of each dtype."""
    recorded: dict[str, set[str]] = {}
    for folder in FOLDERS:
        document = json.loads((folder / "config.json").read_text())
        config = StrategyConfig.from_json(document["strategy"])
        for stage in Pipeline.of(config).stage_ids:
            recorded.setdefault(stage, set()).add(document["layout"]["dtype"])
    assert recorded == {key: {"bfloat16", "float16", "float32"} for key in STAGES}


def test_the_bundle_is_the_recorded_one() -> None:
    """The golden bundle is as small as a recording should be, and what the calibrated recordings name."""
    documents = [json.loads((folder / "config.json").read_text()) for folder in FOLDERS]
    assert {d["bundle"] for d in documents if "bundle" in d} == {bundle().digest}
    assert sum(path.stat().st_size for path in (GOLDEN / "bundle").iterdir()) < 120_000


def choices() -> list[str]:
    """Return which instruction sets this machine has."""
    library = coder()
    widest = Simd.NUMBA if library is None else library.kvserve_widest()
    return [level.name.lower() for level in Simd if level <= widest]


@pytest.mark.parametrize("simd", choices())
@cases([folder for folder in FOLDERS if is_written(folder)])
def test_golden_bytes(folder: Path, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same input gives the recorded bytes, whatever the instruction set."""
    monkeypatch.setenv("KVSERVE_SIMD", simd)
    document, tensors, blob = load(folder)
    config = StrategyConfig.from_json(document["strategy"])
    assert config.digest == document["strategy_digest"]
    made = encode_blob(
        Pipeline.of(config, bundle() if "bundle" in document else None),
        tensors["keys"],
        tensors["values"],
        model_fingerprint=document["model_fingerprint"],
        layout=KVLayout(**document["layout"]),
        layers=range(*document["layers"]),
        tokens=range(*document["tokens"]),
    )
    assert bytes(made) == blob


@pytest.mark.parametrize("simd", choices())
@cases(FOLDERS)
def test_golden_values(folder: Path, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded bytes give the recorded values: bit by bit, or within the last place if calibrated."""
    monkeypatch.setenv("KVSERVE_SIMD", simd)
    document, tensors, blob = load(folder)
    expect = Expectation(
        model_fingerprint=document["model_fingerprint"],
        layout=KVLayout(**document["layout"]),
        layers=range(*document["layers"]),
        tokens=range(*document["tokens"]),
        max_bytes=len(blob),
        bundles=lambda digest: bundle(),
    )
    decoded = decode_blob(blob, expect=expect)
    word = torch.int32 if decoded.keys.dtype == torch.float32 else torch.int16
    for name, tensor in (("keys", decoded.keys), ("values", decoded.values)):
        recorded = tensors[f"decoded_{name}"]
        if "bundle" not in document:
            assert torch.equal(tensor.view(word), recorded.view(word))
            continue
        wanted = recorded.double()
        place = 2.0**-7 * wanted.abs().clamp(min=float(wanted.square().mean().sqrt()))
        assert bool(((tensor.double() - wanted).abs() <= place).all())


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["nehalem"])
def test_golden_on_other_processors(cpu: str, tmp_path: Path) -> None:
    """Machine code for processors with narrower registers writes and reads the same bytes."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": "",
        "KVSERVE_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "numba", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
