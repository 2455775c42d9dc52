"""How much a candidate is expected to add to the front: exact expected hypervolume improvement.

Of the three objectives only the loss is uncertain. For a candidate of known ratio and time, the improvement as a
function of its loss is the area it would add at each level of loss, summed from its own level down to the reference; so
its expectation over a Gaussian loss is a sum of one-dimensional integrals with a closed form, and needs no sampling. It
is the composite form (Astudillo and Frazier, Bayesian Optimization of Composite Functions, 2019) of the improvement in
Emmerich, Giannakoglou and Naujoks, Single- and Multiobjective Evolutionary Optimization Assisted by Gaussian Random
Field Metamodels (2006).
"""

from itertools import pairwise

import numpy as np
from scipy.special import ndtr

from kvserve_profiler.hypervolume import free_areas
from kvserve_profiler.pool import FloatArray


def expected_improvement(
    front: FloatArray, known: FloatArray, mean: FloatArray, deviation: FloatArray, best: float
) -> FloatArray:
    """Return the expected improvement of the hypervolume by each candidate alone.

    Args:
        front: ``[m, 3]`` points observed, as `axes` returns them.
        known: ``[n, 2]`` the candidates' ratio and codec time on those axes.
        mean: ``[n]`` of the predicted loss on its axis.
        deviation: ``[n]`` its standard deviation, positive.
        best: The axis's value of no loss at all.

    Returns:
        ``[n]``, not negative.
    """
    corners = np.maximum(known, 0.0)
    front = front[(front > 0).all(axis=1)]
    front = front[np.argsort(-front[:, 1], kind="stable")]
    # from no loss down to the reference: between two levels, the points at or above the upper one dominate
    levels = np.concatenate([[best], np.minimum(front[:, 1], best), [0.0]])
    total = np.zeros(len(mean))
    for count, (upper, lower) in enumerate(pairwise(levels)):
        if upper > lower:
            gained = free_areas(front[:count, [0, 2]], corners)
            total += gained * _mass_between(mean, deviation, lower, upper)
    return total


def _mass_between(
    mean: FloatArray, deviation: FloatArray, lower: float, upper: float
) -> FloatArray:
    """Return the integral of P(loss axis > u) over u from lower to upper."""
    mass = _hinge((mean - lower) / deviation) - _hinge((mean - upper) / deviation)
    return np.maximum(deviation * mass, 0.0)


def _hinge(z: FloatArray) -> FloatArray:
    """Return the integral of the normal distribution function up to z."""
    hinge: FloatArray = z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return hinge
