"""A calibration bundle of random bases for any model, for tests of what carries bundles; it compresses nothing well."""

from pathlib import Path

import numpy as np

from kvserve_api.strategy import Kind, Part, StageConfig, StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import Basis, BasisKey, Bundle, Contents, Group, Rope, write_bundle

JOINED_LAYERS = 3


def joint_strategy(
    layers: int = JOINED_LAYERS, step: float = 0.02, space: str = "centred"
) -> StrategyConfig:
    """Return a calibrated strategy: the first four tokens raw, the rest as components of keys and values together.

    Args:
        layers: Layers that it joins.
        step: The quantiser's step.
        space: ``centred``, or a metric's name.
    """
    metric = StageConfig(id="transform.metric.v1", params={"metric": space})
    chain = (
        StageConfig(id="transform.unrope.v1"),
        StageConfig(id="transform.mean.v1"),
        *(() if space == "centred" else (metric,)),
        StageConfig(id="transform.pca.v1", params={"layers": layers, "heads": 0}),
        StageConfig(id="quantise.grid.v1", params={"step": step, "dead_zone": 0}),
        StageConfig(id="code.rans.v1", params={"tables": 16}),
    )
    raw = (StageConfig(id="code.raw.v1"),)
    return StrategyConfig(
        parts=(Part(kind="kv", tokens=":4", chain=raw), Part(kind="kv", chain=chain))
    )


def write_sample(
    folder: Path, layout: KVLayout, fingerprint: str, *, seed: int = 0, layers: int = JOINED_LAYERS
) -> Bundle:
    """Write a bundle whose bases are random rotations and return it.

    Args:
        folder: Where to.
        layout: Of the cache.
        fingerprint: Of the model.
        seed: Another seed gives another bundle.
        layers: Layers that its basis joins.
    """
    random = np.random.default_rng(seed)
    shape = (layout.layers, layout.kv_heads, layout.head_dim)
    key = BasisKey("centred", "kv", layers, 0)
    groups = tuple(
        _group(random, len(Kind) * len(block.layers) * layout.kv_heads * layout.head_dim)
        for block in key.blocks(layout)
    )
    rope = Rope(10_000.0 ** -np.linspace(0, 1, layout.head_dim // 2, endpoint=False))
    write_bundle(
        folder,
        Contents(
            model_fingerprint=fingerprint,
            layout=layout,
            ropes=(rope,) * layout.layers,
            means={side: 0.1 * random.standard_normal(shape).astype(np.float32) for side in "kv"},
            deviations={side: np.ones(shape, np.float32) for side in "kv"},
            bases={key: Basis(scale=1.0, groups=groups)},
            provenance={"made": "at random"},
        ),
    )
    return Bundle.open(folder)


def _group(random: np.random.Generator, width: int) -> Group:
    rows, _ = np.linalg.qr(random.standard_normal((width, width)))
    return Group(rows.astype(np.float16), np.ones(width, np.float32))
