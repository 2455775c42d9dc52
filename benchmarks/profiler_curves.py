"""How much of the exhaustive front searches find, by the evaluations they take."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_profiler.hypervolume import axes, hypervolume
from kvserve_profiler.pool import Pool
from kvserve_profiler.search import reference

TARGET: Final = 0.98
"""Share of the exhaustive hypervolume that counts as having found the front."""
Real = NDArray[np.float64]


class Scoring:
    """Judges sets of points by the hypervolume of what was truly measured, as a share of that of all points.

    Attributes:
        exhaustive: Hypervolume of all points for each text, in cubic octaves.
    """

    def __init__(self, pool: Pool, losses_bp: Real, budget_bp: float) -> None:
        """Take the truth.

        Args:
            pool: The points.
            losses_bp: ``[points, texts]``, means over all windows.
            budget_bp: Loss of the reference point.
        """
        origin = reference(pool, budget_bp)
        self._axes = [axes(pool.ratio, losses, pool.codec_s, origin) for losses in losses_bp.T]
        self.exhaustive = np.array([hypervolume(_front(points)) for points in self._axes])

    def curve(self, order: Sequence[int]) -> Real:
        """Return the share after each evaluation, mean of the texts: ``[evaluations]``."""
        shares = np.zeros((len(self._axes), len(order)))
        for text, points in enumerate(self._axes):
            front = np.empty((0, 3))
            share = 0.0
            for count, index in enumerate(order):
                point = points[index]
                if (point > 0).all() and not (front >= point).all(axis=1).any():
                    front = np.vstack([front[~(front <= point).all(axis=1)], point])
                    share = hypervolume(front) / self.exhaustive[text]
                shares[text, count] = share
        mean: Real = shares.mean(axis=0)
        return mean

    def all_knowing(self, target: float) -> int:
        """Return how many points a greedy choice needs for a share, knowing all losses: about the least possible.

        Gains only shrink as points are added, so most need not be computed anew (Minoux, Accelerated greedy algorithms
        for maximizing submodular set functions, 1978).
        """
        chosen: list[int] = []
        share = 0.0
        queue = [(-self._share([index]), index, 0) for index in range(len(self._axes[0]))]
        heapq.heapify(queue)
        while share < target:
            gain, index, when = heapq.heappop(queue)
            if when == len(chosen):
                chosen.append(index)
                share -= gain
            else:
                new = self._share([*chosen, index]) - share
                heapq.heappush(queue, (-new, index, len(chosen)))
        return len(chosen)

    def _share(self, indices: list[int]) -> float:
        pairs = zip(self._axes, self.exhaustive, strict=True)
        return float(np.mean([hypervolume(points[indices]) / volume for points, volume in pairs]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a search did, over several seeds.

    Attributes:
        name: Of the search.
        curves: For each seed the share of the hypervolume after each evaluation.
        suggest_s: Mean seconds to find the next strategy.
    """

    name: str
    curves: tuple[Real, ...]
    suggest_s: float

    @property
    def evals_to_target(self) -> float | None:
        """Median of the evaluations after which the target is reached; None if half of the seeds never reach it."""
        median = float(np.median([evals_to(curve, TARGET) for curve in self.curves]))
        return median if np.isfinite(median) else None

    def quartiles(self, evaluations: int) -> tuple[float, float, float]:
        """Return the quartiles of the share after so many evaluations; a search that ended keeps what it had."""
        shares = [curve[min(evaluations, len(curve)) - 1] for curve in self.curves]
        low, middle, high = np.percentile(shares, [25, 50, 75])
        return float(low), float(middle), float(high)

    def to_json(self, budget: int) -> dict[str, Any]:
        """Return the outcome as an object.

        Args:
            budget: Evaluations at which the share is reported.
        """
        names = ("p25", "p50", "p75")
        return {
            "name": self.name,
            "evals_to_98": self.evals_to_target,
            "hv_at_budget": dict(zip(names, self.quartiles(budget), strict=True)),
            "suggest_s": self.suggest_s,
        }


def evals_to(curve: Iterable[float], target: float) -> float:
    """Return after how many evaluations a curve reaches a share; infinity if it does not."""
    reached = np.asarray(list(curve)) >= target
    return float(np.argmax(reached) + 1) if reached.any() else np.inf


def _front(points: Real) -> Real:
    """Return the points that no other dominates, all maximised."""
    front = np.empty((0, points.shape[1]))
    for point in points[np.argsort(-points.sum(axis=1), kind="stable")]:
        if not (front >= point).all(axis=1).any():
            front = np.vstack([front, point])
    return front
