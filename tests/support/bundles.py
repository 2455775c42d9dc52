"""A calibration bundle of a small made-up model, and KV caches that fit it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import (
    Basis,
    BasisKey,
    Bundle,
    Contents,
    Group,
    Metric,
    Rope,
    write_bundle,
)

LAYOUT: Final = KVLayout(layers=5, kv_heads=2, head_dim=8, dtype="bfloat16")
FINGERPRINT: Final = "sha256:" + "5" * 64
ROPES: Final = (
    Rope(np.array([1.0, 0.5, 0.1]), attention_factor=1.25),
    Rope(np.array([0.7, 0.2, 0.05])),
)
KEYS: Final = tuple(
    BasisKey(space, kinds, layers, heads)
    for space in ("centred", "even")
    for kinds in ("k", "v", "kv")
    for layers, heads in ((1, 1), (1, 0), (2, 0))
)


def write_small_bundle(folder: Path, keys: Iterable[BasisKey] = KEYS) -> Bundle:
    """Write the bundle: 5 layers (the last without rotation), 2 heads of 8, partial rotation, a metric ``even``.

    Args:
        folder: Where to.
        keys: The bases to have.
    """
    rng = np.random.default_rng(7)
    shape = (LAYOUT.layers, LAYOUT.kv_heads, LAYOUT.head_dim)
    metrics = {}
    for kind in ("k", "v"):
        root = np.linalg.qr(rng.standard_normal((*shape, shape[-1])))[0] * rng.uniform(
            0.2, 2, (*shape, 1)
        )
        metrics[kind] = Metric(root.astype(np.float32), np.linalg.inv(root).astype(np.float32))
    contents = Contents(
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        ropes=(ROPES[0], ROPES[0], ROPES[1], ROPES[1], None),
        means={k: rng.standard_normal(shape).astype(np.float32) for k in ("k", "v")},
        deviations={k: rng.uniform(0.3, 2, shape).astype(np.float32) for k in ("k", "v")},
        metrics={"even": metrics},
        bases={key: _basis(key, rng) for key in keys},
        provenance={"made": "for tests"},
    )
    write_bundle(folder, contents)
    return Bundle.open(folder)


def _basis(key: BasisKey, rng: np.random.Generator) -> Basis:
    groups = []
    for block in key.blocks(LAYOUT):
        width = key.width(block, LAYOUT)
        rows = np.linalg.qr(rng.standard_normal((width, width)))[0]
        sigma = np.sort(np.exp(rng.normal(0, 0.5, width)))[::-1]
        groups.append(Group(rows.astype(np.float16), sigma.astype(np.float32)))
    scale = float(np.sqrt(np.mean(np.concatenate([g.sigma for g in groups]) ** 2)))
    weights = [rng.normal(0, 0.3, 6 + 5).astype(np.float32) for _ in groups]
    importance = tuple(weights) if key.space == "even" else ()
    return Basis(scale=scale, groups=tuple(groups), importance=importance)


def small_cache(seed: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of the small model, ``[5, tokens, 2, 8]`` each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.layers, tokens, LAYOUT.kv_heads, LAYOUT.head_dim)
    keys, values = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    return keys.to(dtype), values.to(dtype)
