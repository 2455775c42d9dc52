"""Record payloads of every strategy that has none yet: ``PYTHONPATH=tests/support python -m tests.golden.add_golden``.

A recorded payload is never overwritten: pods of different versions exchange blobs, so bytes that mean something else
are a new stage id, never a new recording. Only where an encoder has learnt to choose better levels is a recording made
anew; some of those before it stay with ``"read_only": true``, and the decoder must still read them to the same values.

``<strategy>/<n>/`` holds ``config.json`` (strategy and ranges), ``input.npz`` (bits of keys and values, and of what
they decode to) and ``blob.bin``; ``bundle/`` is what calibrated strategies were recorded with.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.strategies.calibrated import CALIBRATED_CONFIGS
from tests.strategies.laws import CONFIGS

import bundles
from kvserve_api.wire import KVLayout
from kvserve_strategies import PRESETS, Expectation, Pipeline, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.peers import PEERS

HERE = Path(__file__).parent
FINGERPRINT = "sha256:" + "5a" * 32
PLAIN = {
    **{n: c for n, c in (dict(PRESETS) | dict(PEERS)).items() if not Pipeline.of(c).calibrated},
    # stages in places where no preset has them
    **{name: CONFIGS[f"stage:{name}"] for name in ("token-ladder", "step-ladder", "lead-escape")},
}
CALIBRATED = {"kvtc": PEERS["kvtc"]} | {
    name: CALIBRATED_CONFIGS[name]
    for name in (
        "joint-2x0-even",
        "apart-1x1-centred",
        "sinks",
        "grid-rans",
        "unrope-step",
        "metric-token",
        "pca-scale",
        "importance",
        "importance-heads",
        "recentre",
        "recentre-apart",
        "recentre-importance",
    )
}
# (layers, tokens, kv_heads, head_dim), dtype
CASES = (
    ((2, 37, 1, 16), torch.bfloat16),
    ((1, 21, 3, 10), torch.float16),
    ((1, 16, 2, 8), torch.float32),
)


def make_input(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys with a mean for each channel and an outlying first token, and values."""
    shape, dtype = CASES[n]
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(shape, generator=generator)
    keys += 4 * torch.randn(shape[0], 1, *shape[2:], generator=generator)
    keys[:, 0] *= 5
    values = torch.randn(shape, generator=generator) * torch.rand(
        *shape[:3], 1, generator=generator
    )
    return keys.to(dtype), values.to(dtype)


def words(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bits of a tensor."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).numpy()


def golden_bundle() -> Bundle:
    """Return the bundle beside the recordings, written if there is none."""
    folder = HERE / "bundle"
    if folder.exists():
        return Bundle.open(folder)
    used = {key for config in CALIBRATED.values() for key in Pipeline.of(config).basis_keys}
    return bundles.write_small_bundle(folder, sorted(used))


def add_plain(name: str, n: int) -> None:
    """Record a payload of a strategy without calibration."""
    keys, values = make_input(n)
    dtype = str(keys.dtype).removeprefix("torch.")
    layout = KVLayout(layers=4, kv_heads=keys.shape[2], head_dim=keys.shape[3], dtype=dtype)
    layers, tokens = range(1, 1 + keys.shape[0]), range(5, 5 + keys.shape[1])
    pipeline = Pipeline.of(PLAIN[name])
    record(HERE / name / str(n), pipeline, (keys, values), layout, FINGERPRINT, layers, tokens)


def add_calibrated(name: str, n: int, bundle: Bundle) -> None:
    """Record a payload of a calibrated strategy."""
    (_, count, *_), dtype = CASES[n]
    pair = bundles.small_cache(n, count, dtype)
    layout = dataclasses.replace(bundles.LAYOUT, dtype=str(dtype).removeprefix("torch."))
    # one of the first four tokens, which some code apart, is among these
    layers, tokens = range(layout.layers), range(3, 3 + count)
    pipeline = Pipeline.of(CALIBRATED[name], bundle)
    record(HERE / name / str(n), pipeline, pair, layout, bundles.FINGERPRINT, layers, tokens)


def record(
    folder: Path,
    pipeline: Pipeline,
    pair: tuple[torch.Tensor, torch.Tensor],
    layout: KVLayout,
    fingerprint: str,
    layers: range,
    tokens: range,
) -> None:
    """Write one recording."""
    keys, values = pair
    blob = encode_blob(
        pipeline,
        keys,
        values,
        model_fingerprint=fingerprint,
        layout=layout,
        layers=layers,
        tokens=tokens,
    )
    expect = Expectation(
        model_fingerprint=fingerprint,
        layout=layout,
        layers=layers,
        tokens=tokens,
        max_bytes=len(blob),
        bundles=lambda digest: pipeline.bundle,
    )
    decoded = decode_blob(bytes(blob), expect=expect)
    folder.mkdir(parents=True)
    document = {
        "strategy": pipeline.config.to_json(),
        "strategy_digest": pipeline.digest,
        "model_fingerprint": fingerprint,
        "layout": layout.to_json(),
        "layers": [layers.start, layers.stop],
        "tokens": [tokens.start, tokens.stop],
    }
    if pipeline.bundle is not None:
        document["bundle"] = pipeline.bundle.digest
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(
        folder / "input.npz",
        keys=words(keys),
        values=words(values),
        decoded_keys=words(decoded.keys),
        decoded_values=words(decoded.values),
    )
    (folder / "blob.bin").write_bytes(blob)


def main() -> None:
    """Record what is missing."""
    bundle = golden_bundle()
    for name in (*PLAIN, *CALIBRATED):
        for n in range(len(CASES)):
            if (HERE / name / str(n)).exists():
                continue
            if name in PLAIN:
                add_plain(name, n)
            else:
                add_calibrated(name, n, bundle)
            print(f"recorded {name}/{n}")


if __name__ == "__main__":
    main()
