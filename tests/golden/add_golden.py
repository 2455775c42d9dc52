"""Record payloads of every preset that has none yet: ``python tests/golden/add_golden.py``.

A recorded payload is never overwritten: pods of different versions exchange blobs, so a changed byte is a new stage id,
never a new recording. ``<preset>/<n>/`` holds ``config.json`` (strategy and ranges), ``input.npz`` (bits of keys and
values, and of what they decode to) and ``blob.bin``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvserve_api.wire import KVLayout
from kvserve_strategies import PRESETS, Expectation, Pipeline, decode_blob, encode_blob

HERE = Path(__file__).parent
FINGERPRINT = "sha256:" + "5a" * 32
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


def add(folder: Path, name: str, n: int) -> None:
    """Record one payload."""
    keys, values = make_input(n)
    pipeline = Pipeline.of(PRESETS[name])
    layers, tokens = range(1, 1 + keys.shape[0]), range(5, 5 + keys.shape[1])
    dtype = str(keys.dtype).removeprefix("torch.")
    layout = KVLayout(layers=4, kv_heads=keys.shape[2], head_dim=keys.shape[3], dtype=dtype)
    blob = encode_blob(
        pipeline,
        keys,
        values,
        model_fingerprint=FINGERPRINT,
        layout=layout,
        layers=layers,
        tokens=tokens,
    )
    expect = Expectation(
        model_fingerprint=FINGERPRINT,
        layout=layout,
        layers=layers,
        tokens=tokens,
        max_bytes=len(blob),
    )
    decoded = decode_blob(bytes(blob), expect=expect)
    folder.mkdir(parents=True)
    document = {
        "strategy": pipeline.config.to_json(),
        "strategy_digest": pipeline.digest,
        "model_fingerprint": FINGERPRINT,
        "layout": layout.to_json(),
        "layers": [layers.start, layers.stop],
        "tokens": [tokens.start, tokens.stop],
    }
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
    for name in PRESETS:
        for n in range(len(CASES)):
            folder = HERE / name / str(n)
            if not folder.exists():
                add(folder, name, n)
                print(f"recorded {name}/{n}")


if __name__ == "__main__":
    main()
