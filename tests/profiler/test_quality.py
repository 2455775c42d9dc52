"""Quality loss: its numbers, its bounds, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from kvserve_profiler.quality import MeasurementError, assess, divergence, loss_bp, upper_mean
from kvserve_profiler.settings import Settings

SETTINGS = Settings(block_tokens=8, resamples=4000)


def test_divergence_is_the_textbook_one() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4) is ln 2 - ln 3 / 2."""
    exact = torch.tensor([[0.5, 0.5]]).log()
    other = torch.tensor([[0.25, 0.75]]).log()
    assert divergence(exact, other)[0] == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert divergence(exact, exact)[0] == 0.0


def test_impossible_tokens_do_not_count() -> None:
    """A token that both predictions exclude adds nothing, and no NaN."""
    exact = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert divergence(exact, exact.clone())[0] == 0.0


def test_a_prediction_that_is_not_finite_fails_the_trial() -> None:
    """NaN from the model with the decoded cache is an error, not a number."""
    exact = torch.tensor([[0.5, 0.5]]).log()
    with pytest.raises(MeasurementError, match="not finite"):
        divergence(exact, torch.tensor([[math.nan, 0.0]]))


def test_loss_is_the_growth_of_perplexity() -> None:
    """A divergence of 0.00995 costs 100 basis points."""
    assert loss_bp(0.00995033) == pytest.approx(100.0, abs=0.01)


def test_upper_limit_holds_as_often_as_it_says() -> None:
    """Over many experiments the true mean lies below the limit in at least nine of ten, and the limit is not idle."""
    generator = np.random.default_rng(1)
    held, limits = 0, []
    for _ in range(200):
        windows = [generator.exponential(0.01, 128) for _ in range(4)]
        limit = upper_mean(windows, SETTINGS)
        held += limit >= 0.01
        limits.append(limit)
    assert held >= 180
    assert np.mean(limits) < 0.0125


def test_upper_limit_sees_differences_between_windows() -> None:
    """Windows that lose differently give a wider limit than windows that lose alike."""
    alike = [np.full(64, 0.01)] * 4
    apart = [np.full(64, x) for x in (0.0, 0.005, 0.015, 0.02)]
    assert upper_mean(alike, SETTINGS) == pytest.approx(0.01)
    assert upper_mean(apart, SETTINGS) > 0.014


def test_assessment_is_reproducible_and_ordered() -> None:
    """The same numbers give the same limit; it is not below the estimate."""
    generator = np.random.default_rng(2)
    windows = [generator.exponential(0.01, 64) for _ in range(3)]
    first, second = (
        assess(ratio=2.0, divergences=windows, agreements=[1.0, 0.5, 0.75], settings=SETTINGS)
        for _ in range(2)
    )
    assert first == second
    assert first.loss_upper_bp >= first.loss_bp == loss_bp(first.kl)
    assert first.agreement == 0.75
    assert first.tokens == 192
