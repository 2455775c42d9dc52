"""How much a candidate is expected to add to the front: exact expected hypervolume improvement.

Of the three objectives only the loss is uncertain. For a candidate of known ratio and time, the improvement as a
function of its loss is the area it would add at each level of loss, summed from its own level down to the reference; so
its expectation over a Gaussian loss is a sum of one-dimensional integrals with a closed form, and needs no sampling. It
is the composite form (Astudillo and Frazier, Bayesian Optimization of Composite Functions, 2019) of the improvement in
Emmerich, Giannakoglou and Naujoks, Single- and Multiobjective Evolutionary Optimization Assisted by Gaussian Random
Field Metamodels (2006).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np
from scipy.special import ndtr

from kvserve_profiler.hypervolume import free_areas
from kvserve_profiler.pool import FloatArray, IntArray

AT_ONCE: Final = 256
"""Candidates looked at together: a call for one takes as long as one for many."""


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
    front = _unbeaten(front[(front > 0).all(axis=1)])
    front = front[np.argsort(-front[:, 1], kind="stable")]
    # from no loss down to the reference: between two levels, the points at or above the upper one dominate
    levels = np.concatenate([[best], np.minimum(front[:, 1], best), [0.0]])
    total = np.zeros(len(mean))
    above = _hinge((mean - best) / deviation)
    for count, (upper, lower) in enumerate(pairwise(levels)):
        if upper > lower:
            below = _hinge((mean - lower) / deviation)
            # times the deviation, the integral of P(loss axis > u) over u from lower to upper
            mass = np.maximum(below - above, 0.0)
            total += free_areas(front[:count, [0, 2]], corners) * mass
            above = below
    return total * deviation


def most_improving(
    improvement: Callable[[IntArray], FloatArray], bound: FloatArray
) -> tuple[IntArray, FloatArray]:
    """Return the improvement of every candidate that could be the best, and of few others.

    Args:
        improvement: Returns the improvement of some candidates.
        bound: ``[n]``, what the improvement of each is at most; negative for those that are out of the question.

    Returns:
        Indices of candidates, among them all of the largest improvement, and the improvement of each.
    """
    order = np.argsort(-bound, kind="stable")
    order = order[bound[order] >= 0]
    found = np.empty(0)
    while len(found) < len(order):
        if len(found) and bound[order[len(found)]] < found.max():
            break
        found = np.append(found, improvement(order[len(found) : len(found) + AT_ONCE]))
    return order[: len(found)], found


def _unbeaten(points: FloatArray) -> FloatArray:
    """Return the points that no other dominates: the others bound nothing, and would only add levels."""
    worse, better = points[:, None], points[None]
    beaten = np.all(worse <= better, axis=2) & np.any(worse < better, axis=2)
    kept: FloatArray = points[~np.any(beaten, axis=1)]
    return kept


def _hinge(z: FloatArray) -> FloatArray:
    """Return the integral of the normal distribution function up to z."""
    hinge: FloatArray = z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return hinge
