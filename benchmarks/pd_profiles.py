"""The profiles of ``make bench-pd`` and ``bench-store``: presets, measured on the model as a profiling run does.

Between the presets is one strategy more, as a search finds many.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvserve_api.errors import KVServeError
from kvserve_api.profile_set import DEFAULT_CLASS, ModelIdentity, ParetoSet, Profile
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.bench import Bench
from kvserve_profiler.codec import Codec
from kvserve_profiler.codec_bench_bundle import calibrated_folder
from kvserve_profiler.cost import device_kind
from kvserve_profiler.exits import last_words
from kvserve_profiler.identity import identify
from kvserve_profiler.model import Model, Source
from kvserve_profiler.pareto import front
from kvserve_profiler.settings import Settings
from kvserve_profiler.texts import Text
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.artifacts import open_store
from kvserve_strategies.bundle import Bundle

MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
FINER: Final = "joint-3-finer"
"""`joint-3-fine` with half its step, a point of the searched space: no preset between that and 8 bits loses less."""
NAMES: Final = (
    "none", "lossless", "int8-token", "kivi-4", "cachegen", "centred-rans-fine", "centred-rans",
    "joint-head", "joint-layer", FINER, "joint-3-fine", "joint-3", "joint-10", "focus-3-fine", "focus-3",
)  # fmt: skip
TOKEN_BYTES: Final = 23_040
"""Keys and values of a token of SmolLM2-135M in bfloat16."""
ROOT: Final = Path(__file__).parents[1]


def model_folder() -> Path:
    """Return the folder of the model, fetched once."""
    sys.path.append(str(ROOT / "tools" / "models"))
    import smollm2

    return Path(smollm2.model_folder())


def measured(
    model: Path, bundle: Path | None, cache: Path, names: Sequence[str] = NAMES
) -> ParetoSet:
    """Return all profiles with what was measured of them: from the cache, or measured now in a minute or two.

    Args:
        model: Folder of the model.
        bundle: Folder of a calibration bundle; None to calibrate once, which takes some minutes.
        cache: Where the set and the artifact store, ``artifacts``, are kept.
        names: Presets, or `FINER`.
    """
    strategies = [strategy_of(name) for name in names]
    folder = bundle or calibrated_folder(model, strategies, _say)
    opened = Bundle.open(folder)
    open_store(artifacts(cache)).put_bundle(folder)
    source = Source(location=str(model))
    identity = identify(source)
    key = hashlib.sha256(
        "\n".join(
            [
                identity.fingerprint,
                identity.weights,
                opened.digest,
                Text.builtin().digest,
                device_kind(),
            ]
            + [config.digest for config in strategies]
        ).encode()
    ).hexdigest()[:16]
    kept = cache / f"profiles-{key}.json"
    if kept.is_file():
        return ParetoSet.parse(kept.read_bytes())
    _say(f"measuring {len(names)} profiles on {model.name}: once, one or two minutes")
    text = Text.builtin()
    bench = Bench(Model(source), {text.digest: text}, Settings())
    found = []
    for name in names:
        try:
            found.append(_profile(name, bench, identity.fingerprint, text.digest, opened))
        except KVServeError as error:
            _say(f"{name} is left out: {last_words(error)}")
    result = ParetoSet(
        model=ModelIdentity(name=MODEL, revision="", fingerprint=identity.fingerprint),
        device=device_kind(),
        classes={DEFAULT_CLASS: tuple(sorted(found, key=lambda p: (-p.ratio, p.name)))},
        provenance={"bundle": opened.digest, "text": text.digest},
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(result.canonical())
    return result


def strategy_of(name: str) -> StrategyConfig:
    """Return a preset, or `FINER`."""
    if name != FINER:
        return PRESETS[name]
    whole = PRESETS["joint-3-fine"].to_json()
    for part in whole["parts"]:
        for stage in part["chain"]:
            if stage["id"] == "quantise.grid.v1":
                stage["step"] /= 2
    return StrategyConfig.from_json(whole)


def artifacts(cache: Path) -> str:
    """Return the URL of the store from which the engines fetch the calibration."""
    return (cache / "artifacts").resolve().as_uri()


def of_front(found: ParetoSet, native_bytes: int) -> ParetoSet:
    """Return the set with only what no other profile beats: what a profiling run would publish."""
    return ParetoSet(
        model=found.model,
        device=found.device,
        classes={DEFAULT_CLASS: front(found.classes[DEFAULT_CLASS], native_bytes)},
        provenance=found.provenance,
    )


def _profile(name: str, bench: Bench, fingerprint: str, text: str, bundle: Bundle) -> Profile:
    strategy = strategy_of(name)
    calibrated = Pipeline.of(strategy).calibrated
    codec = Codec.of(
        strategy,
        fingerprint=fingerprint,
        layout=bench.layout,
        bundle=bundle if calibrated else None,
    )
    measurement = bench.measure(codec)
    quality = measurement.qualities[text]
    assert measurement.encode is not None
    assert measurement.decode is not None
    return Profile(
        name=name,
        strategy=strategy,
        ratio=quality.ratio,
        loss_bp=quality.loss_bp,
        loss_upper_bp=quality.loss_upper_bp,
        encode=measurement.encode,
        decode=measurement.decode,
        lossless=measurement.lossless,
        bundle=bundle.digest if calibrated else None,
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
