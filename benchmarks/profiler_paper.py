"""The search of the KVServe paper (arXiv 2605.13734), re-implemented from a description of its published artefact.

It looks for the greatest ratio whose relative accuracy stays above a threshold, with a Gaussian process on accuracy
alone; a front takes one run for each tolerance. Accuracy, which the paper takes from tasks, is here ``exp(-KL)`` as a
percentage, the reciprocal growth of perplexity, mean of the texts; its same axes are here one family.
"""

import warnings
from collections.abc import Generator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

TOLERANCES_PERCENT: Final = (1.0, 0.3, 0.1, 0.5, 0.05)
"""Within the budget of the reference point: what loses more counts nothing there."""
COLD_START: Final = 8
MAX_ITERATIONS: Final = 40
"""Of a run; the paper takes 200 for one."""
RESTARTS: Final = 5
SMALLER: Final = 0.1
"""How much below a feasible ratio candidates are dropped."""
LARGER: Final = 0.4
"""How much above the ratio of one that is far from feasible."""
LEFT: Final = 0.5
"""Remaining range of ratios at which a run of failures ends the search."""

Real = NDArray[np.float64]


def paper(
    features: Real, ratio: Real, groups: Sequence[str], seed: int
) -> Generator[int, Real, None]:
    """Search once for each tolerance; what one run measured costs the next nothing.

    Args:
        features: ``[points, features]``, 0 to 1.
        ratio: ``[points]``.
        groups: Of each point what it shares its axes with.
        seed: Of the restarts of the fit.
    """
    known: dict[int, float] = {}
    for tolerance in TOLERANCES_PERCENT:
        yield from _run(features, ratio, np.array(groups), seed, tolerance, known)


def _run(
    features: Real,
    ratio: Real,
    groups: NDArray[np.str_],
    seed: int,
    tolerance: float,
    known: dict[int, float],
) -> Generator[int, Real, None]:
    threshold = 100.0 - tolerance
    left = np.ones(len(ratio), dtype=bool)
    measured: list[int] = []
    failures = 0
    for step in range(COLD_START + MAX_ITERATIONS):
        iteration = step - COLD_START
        if iteration < 0:
            index = _cold_start(ratio)[step]
        else:
            candidates = np.flatnonzero(left)
            if not len(candidates) or _is_over(ratio[candidates], failures):
                return
            accuracy = np.array([known[i] for i in measured])
            mean, deviation = _predict(features, measured, accuracy, candidates, seed)
            scores = acquisition(ratio[candidates], mean, deviation, threshold, iteration)
            index = int(candidates[np.argmax(scores)])
        if index not in known:
            losses = yield index
            known[index] = float(np.mean(100.0 / (1.0 + losses.mean(axis=1) / 10_000)))
        measured.append(index)
        left[index] = False
        feasible = known[index] >= threshold
        failures = 0 if feasible else failures + 1
        if iteration > MAX_ITERATIONS / 5:
            for each in measured:
                same = groups == groups[each]
                if known[each] >= threshold:
                    left &= ~(same & (ratio <= ratio[each] - SMALLER))
                elif known[each] <= threshold - tolerance:
                    left &= ~(same & (ratio >= ratio[each] + LARGER))


def acquisition(ratio: Real, mean: Real, deviation: Real, threshold: float, iteration: int) -> Real:
    """Return ratio times the chance of being feasible, and a share for what is uncertain, which shrinks.

    Args:
        ratio: ``[n]`` of the candidates.
        mean: ``[n]`` of the predicted accuracy.
        deviation: ``[n]``.
        threshold: Least accuracy.
        iteration: From 0.
    """
    weight = max(0.1, 0.99**iteration)
    if iteration > MAX_ITERATIONS / 5:
        weight /= 2
    chance = ndtr((mean - threshold) / np.maximum(deviation, 1e-12))
    unknown = deviation / max(float(deviation.max()), 1e-12)
    scores: Real = ratio * chance + weight * unknown * ratio.mean()
    return scores


def _cold_start(ratio: Real) -> list[int]:
    """Return points spread over the sorted ratios, from the largest to the smallest."""
    order = np.argsort(-ratio, kind="stable")
    return [int(order[round(i * (len(ratio) - 1) / (COLD_START - 1))]) for i in range(COLD_START)]


def _is_over(ratios: Real, failures: int) -> bool:
    return float(np.ptp(ratios)) <= LEFT and failures > MAX_ITERATIONS / 10


def _predict(
    features: Real, measured: list[int], accuracy: Real, candidates: NDArray[np.intp], seed: int
) -> tuple[Real, Real]:
    process = GaussianProcessRegressor(
        Matern(nu=1.5) + WhiteKernel(1e-4),
        normalize_y=True,
        n_restarts_optimizer=RESTARTS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # a length at the edge of its range, and a fit that stops early, are the method's own affair
        warnings.simplefilter("ignore")
        process.fit(features[measured], accuracy)
        mean, deviation = process.predict(features[candidates], return_std=True)
    return mean, deviation
