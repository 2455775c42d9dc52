"""The calibration bundle of a model that is only to be measured: made once, kept in the cache folder."""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import kvserve_strategies.calibration
from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.calibration.cli import calibrate


def calibrated_folder(
    model: Path, strategies: Iterable[StrategyConfig], say: Callable[[str], None]
) -> Path:
    """Return the folder of a model's bundle, calibrated now on the built-in texts if it never was.

    It is kept under a name made of the model's files, the bases it holds and the calibration's source, so that none of
    them can change without a new calibration.

    Args:
        model: Folder of the model.
        strategies: What it must serve, besides all presets.
        say: Takes messages for people.

    Raises:
        KVServeError: The model can't be calibrated.
    """
    wanted = tuple(strategies)
    target = bundle_folder(model, wanted)
    cache = target.parent
    if target.is_dir():
        return target
    say(f"calibrating {model.name} into {target}: once, a few minutes")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=cache) as scratch:
        made = Path(scratch) / "bundle"
        # what calibration has to say is not what was asked for
        with redirect_stdout(sys.stderr):
            code = calibrate.main(
                ["--model", str(model), "--out", str(made), "--widths", ",".join(_bases(wanted))],
                prog_name="kvserve calibrate",
                standalone_mode=False,
            )
        if code:
            raise KVServeError(f"calibration failed with exit code {code}")
        try:
            os.rename(made, target)
        except OSError:
            # another process was faster: a folder of this name is always complete
            shutil.rmtree(made)
    return target


def bundle_folder(model: Path, strategies: Iterable[StrategyConfig]) -> Path:
    """Return the folder that `calibrated_folder` would return; it may not exist yet."""
    return _cache_folder() / f"{model.name[:64]}-{_key(model, _bases(strategies))}"


def _bases(strategies: Iterable[StrategyConfig]) -> list[str]:
    """Return the bases that strategies and all presets need."""
    wanted = (*PRESETS.values(), *strategies)
    return sorted({str(key) for config in wanted for key in Pipeline.of(config).basis_keys})


def _cache_folder() -> Path:
    if root := os.environ.get("KVSERVE_CACHE_DIR"):
        return Path(root) / "calibrations"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvserve" / "calibrations"


def _key(model: Path, bases: Sequence[str]) -> str:
    """Return 16 hex digits of what a calibration depends on."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise SpecError("--model", f"no *.safetensors in {model}")
    found = hashlib.sha256(",".join(bases).encode())
    for file in files:
        status = file.stat()
        found.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    found.update((model / "config.json").read_bytes())
    for source in sorted(Path(kvserve_strategies.calibration.__path__[0]).rglob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]
