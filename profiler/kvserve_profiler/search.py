"""Which candidates to measure next: Bayesian optimisation of three objectives, two of which are known.

A pure function of the pool and the observations so far, so that a resumed run goes on as if nothing had happened. It
begins with a design that fills the space; then each step takes the candidate that is expected to enlarge the dominated
hypervolume most, summed over the texts, within the quality budgets, and reckoned with the chance that it can be
measured at all.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial.distance import cdist

from kvserve_profiler.acquisition import expected_improvement, most_improving
from kvserve_profiler.hypervolume import Reference, axes, loss_octaves
from kvserve_profiler.pool import FloatArray, IntArray, Observation, Pool, windows_of

if TYPE_CHECKING:
    from kvserve_profiler.surrogate import Surrogate

INITIAL: Final = 6
"""Observations of the space-filling design, before a model says anything."""
INITIAL_FORECAST: Final = 2
"""The same if losses are forecast: a model then says something from the start."""
USELESS: Final = 8.0
"""A loss of so many budgets is as bad as any larger one."""
LEAST_PAIRS: Final = 4
"""Candidates observed on all windows before any other is spared some."""
DOUBT: Final = 2.0
"""Standard deviations by which a loss on a few windows may turn out less on all."""
ROUGHLY: Final = 0.5
"""Octaves of loss to which a front is rounded where its candidates are only sorted out."""
PRIOR_SUCCESSES: Final = 1.0
"""What is held against the first failures: as much as one success right there."""


def suggest(
    pool: Pool,
    observations: Sequence[Observation],
    *,
    seed: int,
    batch: int,
    budgets_bp: Sequence[float],
) -> list[int]:
    """Return the candidates to measure next, the most promising first.

    Args:
        pool: The candidates.
        observations: What was observed, failures too, in any order.
        seed: Breaks ties.
        batch: How many candidates are wanted.
        budgets_bp: For each text the quality budget: what loses more is worth nothing.

    Returns:
        Indices in the pool, different, none of them observed; fewer than ``batch`` when the pool is used up.
    """
    seen = [observation.index for observation in observations]
    batch = min(batch, len(pool) - len(set(seen)))
    initial = INITIAL if pool.forecast is None else INITIAL_FORECAST
    chosen = fill(pool, seen, count=min(batch, max(initial - len(seen), 0)), seed=seed)
    usable = [observation for observation in observations if not observation.failed]
    if not usable:
        rest = fill(pool, [*seen, *chosen], count=batch - len(chosen), seed=seed)
        return [*chosen, *rest]
    if len(chosen) < batch:
        chosen += _improve(pool, observations, chosen, batch - len(chosen), seed, budgets_bp)
    return chosen


def worth_more(
    pool: Pool,
    observations: Sequence[Observation],
    partial: Observation,
    *,
    budgets_bp: Sequence[float],
) -> bool:
    """Tell whether a candidate that was observed on a few windows is worth the others.

    It is not if, as far as those observed on all windows tell how these can differ from the few, it loses more than the
    budget or another is better in everything, on every text.

    Args:
        pool: The candidates.
        observations: What was observed of others.
        partial: What was observed of it.
        budgets_bp: For each text the quality budget.
    """
    if partial.failed:
        return False
    usable = [one for one in observations if not one.failed]
    for text, budget_bp in enumerate(budgets_bp):
        whole = windows_of([one.losses_bp[text] for one in usable])
        few = len(partial.losses_bp[text])
        if len(whole) < LEAST_PAIRS or few >= whole.shape[1]:
            return True
        octaves = loss_octaves(
            np.append(whole[:, :few].mean(axis=1), np.mean(partial.losses_bp[text]))
        )
        shift = loss_octaves(whole.mean(axis=1)) - octaves[:-1]
        hoped = octaves[-1] + shift.mean() - DOUBT * shift.std(ddof=1)
        if hoped > loss_octaves(budget_bp):
            continue
        others = [one for one in usable if len(one.losses_bp[text]) == whole.shape[1]]
        better = [
            pool.ratio[one.index] >= pool.ratio[partial.index]
            and pool.codec_s[one.index] <= pool.codec_s[partial.index]
            and loss_octaves(float(np.mean(one.losses_bp[text]))) <= hoped
            for one in others
        ]
        if not any(better):
            return True
    return False


def fill(pool: Pool, seen: Sequence[int], *, count: int, seed: int) -> list[int]:
    """Return candidates that are far from each other and from those seen, over all ratios; starts first.

    The ratios are cut into as many strata as the design has points; of each stratum comes the candidate that is
    farthest from all before it.
    """
    if count <= 0:
        return []
    places = _places(pool)
    order = np.lexsort((_ties(len(pool), seed), pool.ratio))
    if pool.starts is not None and (~np.isin(np.flatnonzero(pool.starts), seen)).sum() >= count:
        order = order[pool.starts[order]]
    strata = np.array_split(order, max(count, 1))
    taken, chosen = list(seen), list[int]()
    # from both ends inwards: the extremes tell most about the space
    for stratum in sorted(range(len(strata)), key=lambda i: -abs(2 * i - len(strata) + 1)):
        free = np.setdiff1d(strata[stratum], taken, assume_unique=False)
        if not len(free):
            free = np.setdiff1d(order, taken)
        distance = cdist(places[free], places[taken]).min(axis=1) if taken else np.zeros(len(free))
        best = int(free[np.lexsort((_ties(len(pool), seed)[free], -distance))[0]])
        chosen.append(best)
        taken.append(best)
    return chosen


def reference(pool: Pool, budget_bp: float) -> Reference:
    """Return what is worth nothing in a search: no compression, a loss over the budget, the slowest codec."""
    return Reference(loss_bp=budget_bp, codec_s=float(pool.codec_s.max()) * (1 + 1e-9))


def _improve(
    pool: Pool,
    observations: Sequence[Observation],
    pending: Sequence[int],
    count: int,
    seed: int,
    budgets_bp: Sequence[float],
) -> list[int]:
    """Return the candidates of the largest expected improvement, one after the other."""
    # importing botorch takes seconds: a run that is over before it needs a model does without
    from kvserve_profiler.surrogate import Surrogate

    usable = [observation for observation in observations if not observation.failed]
    indices = [observation.index for observation in usable]
    models = [
        Surrogate(
            pool,
            indices,
            [observation.losses_bp[text] for observation in usable],
            text=text,
            most_bp=USELESS * budget_bp,
        )
        for text, budget_bp in enumerate(budgets_bp)
    ]
    for index in pending:
        for model in models:
            model.suppose(index)
    success = success_chance(pool, observations)
    believed = [*indices, *pending]
    everyone = np.arange(len(pool))
    # a front that is rounded down leaves more to gain, and has few levels
    most = success * _gain(pool, models, budgets_bp, believed, everyone, step=ROUGHLY)
    most[[observation.index for observation in observations]] = -1.0
    most[list(pending)] = -1.0
    chosen = list[int]()
    for left in reversed(range(count)):
        some, gain = most_improving(
            lambda some: success[some] * _gain(pool, models, budgets_bp, believed, some), most
        )
        spread = np.sum([model.belief().deviation[some] for model in models], axis=0)
        # where nothing can be gained any more, the least known candidate is measured
        order = np.lexsort((_ties(len(pool), seed)[some], -spread, -gain))
        best_index = int(some[order[0]])
        chosen.append(best_index)
        if not left:
            break
        believed.append(best_index)
        # what is chosen leaves less to gain and less unknown: the others gain at most what they did
        most[some] = gain
        most[best_index] = -1.0
        for model in models:
            model.suppose(best_index)
    return chosen


def _gain(
    pool: Pool,
    models: Sequence["Surrogate"],
    budgets_bp: Sequence[float],
    believed: Sequence[int],
    some: IntArray,
    *,
    step: float | None = None,
) -> FloatArray:
    """Return the expected improvement by some candidates, summed over the texts.

    Args:
        pool: The candidates.
        models: For each text what is believed of the losses.
        budgets_bp: For each text the quality budget.
        believed: Those that make the front, with the losses that are expected of them.
        some: The candidates.
        step: Octaves of loss to which the front is rounded, so that no improvement is too small; None for none.
    """
    gain = np.zeros(len(some))
    for model, budget_bp in zip(models, budgets_bp, strict=True):
        belief = model.belief()
        best = float(loss_octaves(budget_bp))
        points = axes(
            pool.ratio, np.exp2(belief.mean) - 1.0, pool.codec_s, reference(pool, budget_bp)
        )
        front = points[believed]
        if step is not None:
            front[:, 1] = np.floor(front[:, 1] / step) * step
        gain += expected_improvement(
            front,
            points[some][:, [0, 2]],
            best - belief.mean[some],
            belief.deviation[some],
            best,
        )
    return gain


def success_chance(pool: Pool, observations: Sequence[Observation]) -> FloatArray:
    """Return for each candidate the chance that it can be measured, from failures and successes near it.

    Returns:
        ``[n]``, over 0, and 1 everywhere as long as nothing failed.
    """
    places = _places(pool)
    failed = [observation.index for observation in observations if observation.failed]
    if not failed:
        return np.ones(len(pool))
    succeeded = [observation.index for observation in observations if not observation.failed]
    for_it, against = _near(places, succeeded), _near(places, failed)
    chance: FloatArray = (PRIOR_SUCCESSES + for_it) / (PRIOR_SUCCESSES + for_it + against)
    return chance


def _near(places: FloatArray, some: Sequence[int]) -> FloatArray:
    """Return how many of some candidates are near each place, by a Gaussian kernel."""
    distance = cdist(places, places[list(some)], "sqeuclidean")
    near: FloatArray = np.exp(-4.0 * distance).sum(axis=1)
    return near


def _places(pool: Pool) -> FloatArray:
    """Return ``[n, features + 1]`` coordinates whose distances say how different candidates are."""
    columns = np.column_stack([pool.features, np.log2(pool.ratio)])
    span = np.ptp(columns, axis=0)
    places: FloatArray = (columns - columns.min(axis=0)) / np.where(span > 0, span, 1.0)
    return places


def _ties(count: int, seed: int) -> FloatArray:
    return np.random.default_rng(seed).random(count)
