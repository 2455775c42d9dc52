"""The model of the loss: what it knows from a few candidates, and what it knows not to know."""

import math

import numpy as np
import pytest

from kvserve_profiler.hypervolume import loss_octaves
from kvserve_profiler.pool import Pool
from kvserve_profiler.surrogate import Surrogate, octaves_of

RNG = np.random.default_rng(0)
FAMILY, FINE = RNG.integers(0, 3, 120), RNG.random(120)
OCTAVES = 1.0 + 4.0 * FINE + np.array([0.0, 1.5, 3.0])[FAMILY]
POOL = Pool(
    features=np.column_stack([np.eye(3)[FAMILY], FINE]),
    ratio=2.0 ** (1.0 + 2.0 * FINE),
    codec_s=np.full(120, 0.01),
)


def model(indices: list[int]) -> Surrogate:
    """Return a model of what measuring some candidates gives."""
    return Surrogate(POOL, indices, [[2.0 ** OCTAVES[index] - 1.0] for index in indices])


def test_a_few_candidates_tell_of_all() -> None:
    """From 15 of 120 it knows the others to a third of an octave, and says about how well."""
    seen = list(range(15))
    belief = model(seen).belief()
    error = belief.mean[15:] - OCTAVES[15:]
    assert np.sqrt(np.mean(error**2)) < 1 / 3
    assert np.mean(np.abs(error) < 3 * belief.deviation[15:]) > 0.95


def test_a_kind_that_was_never_tried_is_not_known() -> None:
    """Its losses are much less certain than those of kinds that were."""
    seen = np.flatnonzero(FAMILY != 2)[:15].tolist()
    belief = model(seen).belief()
    assert np.median(belief.deviation[FAMILY == 2]) > 2 * np.median(belief.deviation[FAMILY != 2])


def test_supposing_a_loss_makes_it_known_and_moves_nothing() -> None:
    """The expected loss stays where it is, and the candidate and its like have nothing new to tell."""
    process = model(list(range(10)))
    before = process.belief()
    process.suppose(50)
    after = process.belief()
    assert after.mean == pytest.approx(before.mean, abs=1e-3)
    assert after.deviation[50] < 0.5 * before.deviation[50]


def test_a_destroyed_cache_does_not_bend_the_model() -> None:
    """Losses beyond what matters are all alike."""
    losses = [[2.0 ** OCTAVES[index] - 1.0] for index in range(12)]
    wild = [*losses[:-1], [1e9]]
    mild = [*losses[:-1], [1e4]]
    one, other = (
        Surrogate(POOL, range(12), some, most_bp=800.0).belief().mean for some in (wild, mild)
    )
    assert one == pytest.approx(other)
    assert math.isclose(octaves_of(wild)[0][-1], float(loss_octaves(1e9)))


def test_forecasts_tell_of_all_after_a_few() -> None:
    """From four candidates it learns by how much forecasts are off, and which kind's more than others'."""
    off = 0.7 + np.array([0.0, 0.3, 0.0])[FAMILY]
    forecast = np.exp2(OCTAVES - off)[:, None, None] * np.ones(2) - 1.0
    pool = Pool(
        features=POOL.features,
        ratio=RNG.permutation(POOL.ratio),
        codec_s=POOL.codec_s,
        forecast=np.maximum(forecast, 0.0),
    )
    seen = [int(np.flatnonzero(family == FAMILY)[0]) for family in (0, 1, 2, 1)]
    losses = [[2.0 ** OCTAVES[index] - 1.0] for index in seen]
    belief = Surrogate(pool, seen, losses, most_bp=800.0).belief()
    error = belief.mean - OCTAVES
    assert np.sqrt(np.mean(error**2)) < 0.2
    assert np.mean(np.abs(error) < 3 * belief.deviation) > 0.95


def test_directed_forecasts_say_more_than_scattered_ones() -> None:
    """Where the two disagree by an octave, what is expected lies a quarter of it below the directed one."""
    octaves = np.stack([OCTAVES, OCTAVES - 1.0], axis=1)
    pool = Pool(
        features=POOL.features,
        ratio=POOL.ratio,
        codec_s=POOL.codec_s,
        forecast=np.maximum(np.exp2(octaves)[:, None] - 1.0, 0.0),
    )
    # one that loses what is expected leaves all others where they were
    at = int(np.argmin(np.abs(OCTAVES - 4.0)))
    belief = Surrogate(pool, [at], [[2.0 ** (OCTAVES[at] - 0.25) - 1.0]]).belief()
    assert belief.mean[OCTAVES > 1.0] == pytest.approx(OCTAVES[OCTAVES > 1.0] - 0.25, abs=1e-6)
