"""Searches to compare: random, Sobol, NSGA-II, the KVServe paper's, and KVServe's own.

Each yields one strategy of the pool after the other and is sent its losses. Ratio and codec time of the whole pool are
known to all from the start; a strategy that was measured before costs nothing more, so it is not yielded again.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy.stats import qmc

from kvserve_profiler.candidates import ALWAYS, PER_TRIAL
from kvserve_profiler.plan import BATCH
from kvserve_profiler.pool import Observation, Pool
from kvserve_profiler.search import suggest
from kvserve_profiler.space import Space
from kvserve_profiler.space_point import FAMILY, Point
from profiler_paper import paper

Losses: TypeAlias = NDArray[np.float64]
"""``[texts, windows]``, in basis points."""
Search: TypeAlias = Generator[int, Losses, None]
"""Yields the index of what to measure and is sent what was found."""

POPULATION: Final = 20
"""Of NSGA-II: some generations must fit into a few hundred evaluations."""
SHARE: Final = 50
"""The budget of evaluations is one in so many of the space."""
_STALE: Final = 2000
"""So many individuals in a row that were measured before, or can't be, end an evolution."""
_MAX_DRAWS: Final = 1 << 17


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What every search is given.

    Attributes:
        space: The space.
        points: Its points.
        pool: Their features, ratios and codec times.
        texts: How many texts there are.
        budget_bp: What loses more is worth nothing.
        forecast_bp: ``[points, texts, windows, 2]``: what is forecast of each loss, by each window of a text alone.
    """

    space: Space
    points: Sequence[Point]
    pool: Pool
    texts: int
    budget_bp: float
    forecast_bp: NDArray[np.float64]


def random(problem: Problem, seed: int) -> Search:
    """Measure in random order."""
    for index in np.random.default_rng(seed).permutation(len(problem.pool)):
        yield int(index)


def sobol(problem: Problem, seed: int) -> Search:
    """Measure along a scrambled Sobol sequence (Owen, 1998) over family and parameters.

    A family is as likely as it has points. Values that don't go together are passed over.
    """
    families = problem.space.families
    sizes = [sum(point.family == family.name for point in problem.points) for family in families]
    bounds = np.cumsum(sizes) / sum(sizes)
    index_of = {point: index for index, point in enumerate(problem.points)}
    sequence = qmc.Sobol(1 + max(len(family.parameters) for family in families), seed=seed)
    seen = set[int]()
    while len(seen) < len(problem.pool) and sequence.num_generated < _MAX_DRAWS:
        for row in sequence.random(1024):
            family = families[int(np.searchsorted(bounds, row[0], "right"))]
            values = {
                parameter.name: parameter.values[int(unit * len(parameter.values))]
                for parameter, unit in zip(family.parameters, row[1:], strict=False)
            }
            index = index_of.get(Point(family.name, values))
            if index is not None and index not in seen:
                seen.add(index)
                yield index


def nsga2(problem: Problem, seed: int) -> Search:
    """Measure what NSGA-II (Deb et al., 2002) breeds, in optuna's implementation.

    An individual has a gene for its family and one for each parameter of each family; those of other families rest.
    Values that don't go together make no individual.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    families = {family.name: family for family in problem.space.families}
    genes: dict[str, optuna.distributions.BaseDistribution] = {
        FAMILY: optuna.distributions.CategoricalDistribution(list(families))
    }
    for family in families.values():
        for parameter in family.parameters:
            genes[f"{family.name}.{parameter.name}"] = optuna.distributions.IntDistribution(
                0, len(parameter.values) - 1
            )
    index_of = {point: index for index, point in enumerate(problem.points)}
    study = optuna.create_study(
        directions=["minimize"] * (2 + problem.texts),
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
    )
    known: dict[int, list[float]] = {}
    stale = 0
    while stale < _STALE and len(known) < len(problem.pool):
        trial = study.ask(genes)
        family = families[trial.params[FAMILY]]
        values = {
            parameter.name: parameter.values[trial.params[f"{family.name}.{parameter.name}"]]
            for parameter in family.parameters
        }
        index = index_of.get(Point(family.name, values))
        stale += 1
        if index is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if index not in known:
            losses = yield index
            free = [-np.log(problem.pool.ratio[index]), np.log(problem.pool.codec_s[index])]
            known[index] = [*free, *losses.mean(axis=1)]
            stale = 0
        study.tell(trial, known[index])


def kvserve(problem: Problem, seed: int) -> Search:
    """Measure what a profiling run does that screens all strategies.

    A run forecasts by one window of each text, its first; here the seed says by which.
    """
    yield from _engine(problem, _forecast(problem, seed), seed, range(len(problem.points)))


def unforecast(problem: Problem, seed: int) -> Search:
    """Measure what the engine suggests if nothing is forecast."""
    yield from _engine(problem, None, seed, range(len(problem.points)))


def sampled(problem: Problem, seed: int) -> Search:
    """Measure what a profiling run does whose trials are one in `SHARE`: it screens a sample of the strategies."""
    count = len(problem.points) // SHARE * PER_TRIAL
    assert problem.pool.starts is not None
    presets = np.flatnonzero(problem.pool.starts)
    others = np.setdiff1d(np.random.default_rng(seed).permutation(len(problem.points)), presets)
    rest = np.random.default_rng(seed).permutation(others)[: max(count - len(presets), 0)]
    chosen = [*presets.tolist(), *sorted(rest.tolist())]
    yield from _engine(problem, _forecast(problem, seed), seed, chosen)


def _forecast(problem: Problem, seed: int) -> NDArray[np.float64]:
    """Return ``[points, texts, 2]`` forecasts by a window of each text."""
    windows = np.random.default_rng(seed).integers(problem.forecast_bp.shape[2], size=problem.texts)
    texts = np.arange(problem.texts)
    return problem.forecast_bp[:, texts, windows]


def _engine(
    problem: Problem, forecast: NDArray[np.float64] | None, seed: int, screened: Sequence[int]
) -> Search:
    """Measure what is always measured first, then batches of what the engine suggests of some strategies."""
    chosen = list(screened)
    whole = problem.pool
    pool = Pool(
        features=whole.features[chosen],
        ratio=whole.ratio[chosen],
        codec_s=whole.codec_s[chosen],
        forecast=None if forecast is None else forecast[chosen],
        starts=None if whole.starts is None else whole.starts[chosen],
    )
    presets = problem.space.presets()
    index_of = {problem.points[index]: at for at, index in enumerate(chosen)}
    batch = [index_of[presets[name]] for name in ALWAYS]
    observations: list[Observation] = []
    while batch:
        found = []
        for index in batch:
            losses = yield chosen[index]
            found.append(Observation(index=index, losses_bp=losses.tolist()))
        observations += found
        batch = suggest(
            pool,
            observations,
            seed=seed,
            batch=BATCH,
            budgets_bp=[problem.budget_bp] * problem.texts,
        )


def the_paper(problem: Problem, seed: int) -> Search:
    """Measure what the KVServe paper's algorithm asks for."""
    groups = [point.family for point in problem.points]
    return paper(problem.pool.features, problem.pool.ratio, groups, seed)


METHODS: Final[Mapping[str, Callable[[Problem, int], Search]]] = MappingProxyType(
    {
        "random": random,
        "Sobol": sobol,
        "NSGA-II": nsga2,
        "KVServe paper": the_paper,
        "KVServe, no forecasts": unforecast,
        "KVServe, sampled": sampled,
        "KVServe": kvserve,
    }
)
"""Every search by its name."""


def replay(search: Search, losses: NDArray[np.float64], most: int) -> Iterator[int]:
    """Yield what a search measures, in order.

    Args:
        search: The search.
        losses: ``[points, texts, windows]``, in basis points.
        most: Evaluations after which to stop.
    """
    index = next(search)
    for done in range(1, most + 1):
        yield index
        if done == most:
            search.close()
            return
        try:
            index = search.send(losses[index])
        except StopIteration:
            return
