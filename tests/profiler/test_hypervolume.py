"""Volumes of sets of points, against a library's and against counting."""

import numpy as np
import pytest

from kvserve_profiler.acquisition import expected_improvement
from kvserve_profiler.hypervolume import Reference, axes, free_areas, hypervolume

RNG = np.random.default_rng(0)


def test_axes_count_octaves_from_the_reference() -> None:
    """Twice the ratio, half of the time and about half of the loss are one octave each."""
    reference = Reference(loss_bp=127.0, codec_s=0.08)
    points = axes(np.array([2.0]), np.array([63.0]), np.array([0.04]), reference)
    assert points == pytest.approx(np.array([[1.0, 1.0, 1.0]]))
    assert axes(np.array([1.0]), np.array([0.0]), np.array([0.08]), reference)[0, 1] == 7.0


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_a_volume_is_the_librarys(count: int) -> None:
    """Random points have the hypervolume that BoTorch computes."""
    import torch
    from botorch.utils.multi_objective.hypervolume import Hypervolume
    from botorch.utils.multi_objective.pareto import is_non_dominated

    points = torch.from_numpy(RNG.random((count, 3)) * 4)
    theirs = Hypervolume(torch.zeros(3, dtype=points.dtype)).compute(
        points[is_non_dominated(points)]
    )
    assert hypervolume(points.numpy()) == pytest.approx(theirs)


def test_what_is_worth_nothing_adds_nothing() -> None:
    """NaN, infinity and points behind the reference change no volume and hide no point."""
    good = np.array([[1.0, 2.0, 3.0]])
    bad = np.array([[np.nan, 9.0, 9.0], [9.0, np.inf, 9.0], [9.0, 9.0, -1.0], [9.0, 0.0, 9.0]])
    assert hypervolume(np.vstack([bad, good])) == hypervolume(good) == 6.0
    assert hypervolume(bad) == 0.0
    assert hypervolume(np.empty((0, 3))) == 0.0


def test_free_areas_are_what_is_left_of_rectangles() -> None:
    """The union of two overlapping rectangles is counted once."""
    front = np.array([[1.0, 3.0], [2.0, 1.0], [0.5, 0.5]])
    corners = np.array([[2.0, 3.0], [1.0, 1.0], [3.0, 0.5], [0.0, 5.0]])
    assert free_areas(front, corners) == pytest.approx([2.0, 0.0, 0.5, 0.0])
    assert free_areas(np.empty((0, 2)), corners) == pytest.approx([6.0, 1.0, 1.5, 0.0])


def test_an_expected_improvement_is_the_mean_of_improvements() -> None:
    """The closed form agrees with volumes of sampled losses, within the error of sampling."""
    front = np.array([[3.0, 1.0, 2.0], [1.0, 4.0, 2.5], [2.0, 2.0, 0.5], [0.5, 6.0, 4.0]])
    known = np.array([[2.5, 2.2], [4.0, 1.0], [0.4, 3.0]])
    mean, deviation, best = np.array([2.0, 0.5, 6.2]), np.array([1.0, 2.0, 0.5]), 6.5
    exact = expected_improvement(front, known, mean, deviation, best)
    whole = hypervolume(front)
    for row in range(3):
        losses = np.minimum(mean[row] + deviation[row] * RNG.standard_normal(500), best)
        gains = [
            hypervolume(np.vstack([front, [known[row, 0], loss, known[row, 1]]])) - whole
            for loss in losses
        ]
        error = 4 * np.std(gains) / np.sqrt(len(gains))
        assert abs(float(np.mean(gains)) - exact[row]) <= error + 1e-12


def test_nothing_is_expected_of_what_is_beaten_for_sure() -> None:
    """A candidate inside the volume with a certain loss, and one over the budget, add nothing."""
    front = np.array([[3.0, 3.0, 3.0]])
    known = np.array([[2.0, 2.0], [5.0, 5.0], [5.0, 5.0]])
    gain = expected_improvement(
        front, known, np.array([1.0, -2.0, 1.0]), np.array([1e-3, 1e-3, 1e-3]), 5.0
    )
    assert gain[:2] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert gain[2] == pytest.approx(25.0 - 9.0, abs=0.1)
