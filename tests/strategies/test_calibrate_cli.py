"""``kvserve calibrate``: a model's folder in, the same bundle out each time, or one line that says what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import smollm2
from kvserve_api.names import ExitCode
from kvserve_strategies.artifacts import open_store
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.calibration.cli import DEFAULT_TOKENS, calibrate
from kvserve_strategies.calibration.models import TransformersModel
from kvserve_strategies.calibration.ropes import turn
from kvserve_strategies.calibration.run import DEFAULT_TOKENS as RUN_TOKENS
from kvserve_strategies.calibration.run import Order, provenance_of
from tiny_models import config, save_model

QUICK = ("--tokens", "2048", "--widths", "1,1x1,3", "--threads", "1")
ARCHITECTURES = {
    "llama": config("LlamaConfig"),
    "qwen2": config("Qwen2Config", num_hidden_layers=4),
    "gemma3": config("Gemma3TextConfig", num_hidden_layers=6, head_dim=16, sliding_window=64),
}


@pytest.fixture(scope="module", params=[pytest.param(name, id=name) for name in ARCHITECTURES])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model of each architecture."""
    return save_model(tmp_path_factory.mktemp(request.param), ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    return save_model(tmp_path_factory.mktemp("model"), ARCHITECTURES["llama"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a cache of this test's own."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))


def run(model: Path, out: Path, *options: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(calibrate, ["--model", str(model), "--out", str(out), *options])


def calibrated(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run the command quickly and return its JSON."""
    done = run(model, out, *QUICK, "--json", *options)
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_a_bundle_fits_its_model(any_model: Path, tmp_path: Path) -> None:
    """Means, rotations and bases are of the model's own keys and values."""
    result = calibrated(any_model, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle", digest=result["digest"])
    model = TransformersModel(any_model)
    assert (bundle.model_fingerprint, bundle.layout) == (model.fingerprint, model.layout)
    assert {BasisKey("fisher", "kv", 1, 0), BasisKey("fisher", "kv", 1, 1)} <= set(
        bundle.basis_keys
    )
    read = model.prefill(model.tokenise(Path(json.__file__).read_text())[:400])
    for side, tensors in (("k", read.keys), ("v", read.values)):
        for layer in range(model.layers):
            assert bundle.rope_of(layer) == model.rope_of(layer)
            cells = tensors[layer].float()
            if side == "k" and (rope := model.rope_of(layer)):
                cells = turn(cells, rope, range(len(cells)), back=True)
                cells[..., : rope.rotary_dim] /= rope.attention_factor
            mean = torch.tensor(bundle.mean(side)[layer])
            spread = torch.tensor(bundle.deviation(side)[layer])
            # text the bundle has not seen: most of it lies within what was learnt
            assert ((cells - mean).abs() < 4 * spread).float().mean() > 0.95
    for key in bundle.basis_keys:
        for rows, sigma in bundle.basis(key).groups:
            gram = rows.astype(np.float64) @ rows.astype(np.float64).T
            np.testing.assert_allclose(gram, np.eye(len(rows)), atol=5e-3)
            assert sigma[0] > 0


def test_the_same_order_gives_the_same_bundle(model: Path, tmp_path: Path) -> None:
    """Another seed gives another one; nothing depends on where or when."""
    first, again, other = (
        calibrated(model, tmp_path / name, "--seed", seed)["digest"]
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert first == again != other


def test_a_bundle_says_how_it_was_made(model: Path, tmp_path: Path) -> None:
    """Model, weights, texts, seed, settings and tools; no paths, no times."""
    text = tmp_path / "mine.txt"
    text.write_text(Path(json.__file__).read_text() * 2)
    result = calibrated(model, tmp_path / "bundle", "--text", str(text), "--seed", "5")
    made = result["provenance"]
    assert made == Bundle.open(tmp_path / "bundle").provenance
    assert made["seed"] == 5
    assert made["model"]["type"] == "llama"
    assert len(made["texts"]) == 1
    assert made["read_tokens"] >= 2048
    assert set(made["tools"]) == {"kvserve", "torch", "transformers", "numpy"}
    manifest = (tmp_path / "bundle" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert str(model) not in manifest


def test_what_would_be_made_is_known_without_making_it(model: Path, tmp_path: Path) -> None:
    """A resumed run finds out that a bundle is the one it would make."""
    made = calibrated(model, tmp_path / "bundle", "--seed", "2")["provenance"]
    keys = (
        BasisKey("fisher", "kv", 1, 0),
        BasisKey("fisher", "kv", 1, 1),
        BasisKey("fisher", "kv", 3, 0),
    )
    order = Order(model=model, tokens=2048, keys=keys, seed=2, threads=1)
    expected = json.loads(json.dumps(provenance_of(order)))
    assert expected.items() <= made.items()


def test_a_bundle_goes_into_the_store(model: Path, tmp_path: Path) -> None:
    """And comes back by its digest."""
    url = (tmp_path / "store").as_uri()
    done = run(model, tmp_path / "bundle", *QUICK, "--store", url)
    assert done.exit_code == 0, done.output
    digest = Bundle.open(tmp_path / "bundle").digest
    assert digest in done.stdout
    assert (
        open_store(url).get_bundle(digest).model_fingerprint == TransformersModel(model).fingerprint
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        pytest.param(("--widths", "1,x"), "--widths: 'x' is none", id="width"),
        pytest.param(("--store", "ftp://x"), "artifacts: must begin with", id="store"),
        pytest.param(("--text", "{folder}/short.txt"), "give longer texts", id="short"),
        pytest.param(("--text", "{folder}/binary"), "is not UTF-8 text", id="binary"),
        pytest.param(("--out", "{folder}"), "not an empty folder: give a new one", id="out"),
        pytest.param(("--model", "{folder}"), "no config.json", id="model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, options: tuple[str, ...], problem: str
) -> None:
    """With the exit code for bad input, and nothing written."""
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    filled = [option.format(folder=tmp_path) for option in options]
    done = run(model, tmp_path / "bundle", "--tokens", "512", *filled)
    assert done.exit_code == ExitCode.BAD_INPUT, done.output
    assert done.stderr.splitlines()[-1].startswith("kvserve calibrate: Invalid")
    assert problem in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_model_that_can_not_be_calibrated(tmp_path: Path) -> None:
    """It has its own exit code."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba", "num_hidden_layers": 2})
    )
    done = run(tmp_path, tmp_path / "bundle")
    assert done.exit_code == ExitCode.UNSUPPORTED
    assert "has no attention" in done.stderr


def test_help_needs_no_torch() -> None:
    """It comes at once, though torch and transformers take seconds to import."""
    code = (
        "import sys; sys.argv = ['kvserve', 'calibrate', '--help']\n"
        "from kvserve_strategies.calibration.cli import calibrate\n"
        "try: calibrate()\n"
        "except SystemExit: print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--widths" in done.stdout
    assert DEFAULT_TOKENS == RUN_TOKENS


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2, from few tokens: its bundle, and a wide basis that gathers what text has in common."""
    done = run(
        smollm2.model_folder(),
        tmp_path / "bundle",
        "--tokens",
        "5120",
        "--widths",
        "3",
        "--threads",
        "2",
    )
    assert done.exit_code == 0, done.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.layout.layers, bundle.layout.kv_heads, bundle.layout.head_dim) == (30, 3, 64)
    assert bundle.rope_of(29) is not None
    for _, sigma in bundle.basis(BasisKey("fisher", "kv", 3, 0)).groups:
        # half of the energy lies in an eighth of the components
        energy = np.square(sigma.astype(np.float64))
        assert energy[: len(energy) // 8].sum() > 0.5 * energy.sum()
