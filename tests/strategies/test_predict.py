"""Prediction from the layer before: what it saves, that errors do not add up, and what it refuses."""

import struct

import numpy as np
import pytest
import torch

from kvserve_api.errors import StrategyError, WireError
from kvserve_strategies import Pipeline
from kvserve_strategies.presets import strategy
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    Centre,
    ConstantStep,
    Lead,
    Pack,
    PredictLayer,
    Rans,
    TokenMinMax,
)

LAYERS, TOKENS, HEADS, DIM = SHAPE = (12, 256, 2, 16)


def pipeline(*stages: Stage) -> Pipeline:
    """Return the pipeline that codes keys and values by the same stages."""
    return Pipeline.of(strategy(keys=stages, values=stages))


def walk(noise: float) -> torch.Tensor:
    """Return layers each of which is the one before, its channels in another order, and some noise."""
    rng = np.random.default_rng(0)
    layer = rng.standard_normal((TOKENS, HEADS * DIM))
    layers = [layer]
    for _ in range(LAYERS - 1):
        layer = layer[:, rng.permutation(HEADS * DIM)] + noise * rng.standard_normal(layer.shape)
        layers.append(layer)
    return torch.from_numpy(np.stack(layers)).reshape(SHAPE).float()


def test_what_layers_share_is_sent_once() -> None:
    """Layers that differ by a tenth take less than half the bytes at the same step, wherever their channels moved."""
    x = walk(0.1)
    step = 0.1
    plain = pipeline(ConstantStep(relative_step=step), Rans(tables=4))
    # what is left is about a tenth as large, and so is the step relative to it
    predicted = pipeline(
        PredictLayer(sources=2), ConstantStep(relative_step=8 * step), Rans(tables=4)
    )
    made, by_prediction = plain.encode(x, x), predicted.encode(x, x)
    assert len(by_prediction) < 0.55 * len(made)
    errors = [
        (p.decode(payload, shape=SHAPE, dtype=x.dtype)[0] - x)[1:].pow(2).mean().sqrt()
        for p, payload in ((plain, made), (predicted, by_prediction))
    ]
    assert errors[1] < 1.3 * errors[0]


def test_errors_do_not_add_up() -> None:
    """The last layer is as good as the second, because each is predicted from what the decoder has."""
    x = walk(0.3)
    made = pipeline(PredictLayer(sources=2), ConstantStep(relative_step=1.0), Rans(tables=2))
    decoded, _ = made.decode(made.encode(x, x), shape=SHAPE, dtype=x.dtype)
    errors = (decoded - x).pow(2).mean((1, 2, 3)).sqrt()
    assert errors[-1] < 1.3 * errors[1]


def test_layers_with_nothing_in_common_cost_little_more() -> None:
    """Independent layers are coded as without prediction, but for its head and a table and states for each layer."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    quantiser = (ConstantStep(relative_step=0.5), Rans(tables=1))
    plain = len(pipeline(*quantiser).encode(x, x))
    made = len(pipeline(PredictLayer(sources=1), *quantiser).encode(x, x))
    head = 2 * (4 * (LAYERS - 1) * HEADS * DIM)
    of_layers = 2 * LAYERS * (4 * 32 + 100)
    assert made < 1.02 * plain + head + of_layers


def test_it_takes_any_quantiser_and_coder() -> None:
    """Fixed-width levels follow it, too; one layer alone is coded without prediction."""
    stages = (
        Lead(tokens=2),
        Centre(),
        PredictLayer(sources=3),
        TokenMinMax(levels=256, group=0),
        Pack(),
    )
    made = pipeline(*stages)
    assert not made.lossless
    assert not made.fixed_size
    assert "predict.layer.v1" in made.stage_ids
    assert made.stage_ids[-2:] == ("quantise.token.v1", "code.pack.v1")
    for layers in (1, LAYERS):
        x = walk(0.2)[:layers].bfloat16()
        shape = (layers, *SHAPE[1:])
        payload = made.encode(x, x)
        assert len(payload) == made.max_encoded_nbytes(
            layers=layers, tokens=TOKENS, kv_heads=HEADS, head_dim=DIM, dtype=x.dtype
        )
        decoded, _ = made.decode(payload, shape=shape, dtype=x.dtype)
        assert torch.equal(decoded[:, :2], x[:, :2])
        assert (decoded - x).abs().max() < 0.06


def test_what_can_not_follow_it_does_not_construct() -> None:
    """A coder of native values, a second prediction's levels, and a quantiser before it are refused."""
    with pytest.raises(StrategyError, match=r"code\.pack\.v1: takes levels values"):
        pipeline(PredictLayer(sources=1), Pack())
    with pytest.raises(StrategyError, match=r"predict\.layer\.v1: can't follow quantise"):
        pipeline(ConstantStep(relative_step=1.0), PredictLayer(sources=1), Rans(tables=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("length", 2**63, id="length"),
        pytest.param("source", 0xFFFF, id="source"),
        pytest.param("weight", 0x7C00, id="infinite-weight"),
        pytest.param("weight", 0x7E00, id="nan-weight"),
    ],
)
def test_a_hostile_head_is_refused(field: str, value: int) -> None:
    """A length past the end, a source that is no channel, and a weight that is no number are typed errors."""
    made = pipeline(PredictLayer(sources=1), ConstantStep(relative_step=1.0), Rans(tables=1))
    x = walk(0.1)
    payload = bytearray(made.encode(x, x))
    # two chains of one section each: their lengths come first
    head = 16
    sources = head + 8 * LAYERS
    weights = sources + 2 * (LAYERS - 1) * HEADS * DIM
    where, form = {"length": (head, "<Q"), "source": (sources, "<H"), "weight": (weights, "<H")}[
        field
    ]
    struct.pack_into(form, payload, where, value)
    with pytest.raises(WireError, match=r"predict\.layer\.v1"):
        made.decode(payload, shape=SHAPE, dtype=x.dtype)
