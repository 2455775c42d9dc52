"""Forecasts of the loss agree with the loss, for errors small enough to have one."""

import math
from pathlib import Path

import pytest
import torch

from kvserve_profiler.model import KV, Model, Source
from kvserve_profiler.quality import divergence
from kvserve_profiler.sensitivity import MOST_NATS, Sensitivity

TOKENS = list(range(3, 43))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    """A tiny model."""
    return Model(Source(location=str(model_folder)))


@pytest.fixture(scope="module")
def exact(model: Model) -> KV:
    """Its cache of a text, in float32: an error must not vanish in rounding."""
    kv = model.prefill(TOKENS[:30])
    return KV(keys=kv.keys.float(), values=kv.values.float())


def test_forecasts_are_the_divergence_of_small_errors(model: Model, exact: KV) -> None:
    """With many gradients, both come close to what independent errors cost, the directed one also to a layer's own."""
    sensitivity = Sensitivity.of(model, exact, TOKENS[30:], samples=256, seed=0)
    predictions = model.log_probabilities(TOKENS[30:], exact)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *exact.keys.shape, generator=generator)
    layers, _, _, head_dim = exact.keys.shape
    together = torch.randn(2, layers, 1, 1, head_dim, generator=generator).expand_as(noise).clone()
    together[1] = 0
    scattered, directed, true = [], [], []
    for error in (0.02 * noise, 0.02 * together):
        broken = KV(keys=exact.keys + error[0], values=exact.values + error[1])
        scored = model.log_probabilities(TOKENS[30:], broken)
        true.append(divergence(predictions, scored).mean())
        forecast = sensitivity.forecast(exact, broken)
        directed.append(forecast.directed)
        scattered.append(forecast.scattered)
    assert directed == pytest.approx(true, rel=0.35)
    assert scattered[0] == pytest.approx(true[0], rel=0.5)
    # what is added to the keys of all tokens hardly changes how they compare, which squares can't know
    assert abs(math.log(scattered[1] / true[1])) > abs(math.log(directed[1] / true[1]))


def test_no_error_costs_nothing_and_a_broken_cache_the_most(model: Model, exact: KV) -> None:
    """Forecasts are finite whatever comes out of a codec."""
    sensitivity = Sensitivity.of(model, exact, TOKENS[30:], samples=2, seed=0)
    same = sensitivity.forecast(exact, exact)
    assert (same.directed, same.scattered) == (0.0, 0.0)
    broken = KV(keys=exact.keys * math.nan, values=exact.values)
    lost = sensitivity.forecast(exact, broken)
    assert (lost.directed, lost.scattered) == (MOST_NATS, MOST_NATS)


def test_gradients_follow_from_the_seed(model: Model, exact: KV) -> None:
    """The same seed draws the same tokens, so a run that was killed forecasts alike."""
    one, same, other = (
        Sensitivity.of(model, exact, TOKENS[30:], samples=2, seed=seed) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(one.gradients, same.gradients, rtol=0, atol=0)
    assert not torch.equal(one.gradients, other.gradients)
