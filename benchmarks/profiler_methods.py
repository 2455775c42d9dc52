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

from kvserve_profiler.candidates import ALWAYS
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
    """

    space: Space
    points: Sequence[Point]
    pool: Pool
    texts: int
    budget_bp: float


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
    """Measure what a profiling run does: what it always measures first, then batches of what the engine suggests."""
    presets = problem.space.presets()
    index_of = {point: index for index, point in enumerate(problem.points)}
    batch = [index_of[presets[name]] for name in ALWAYS]
    observations: list[Observation] = []
    while batch:
        found = []
        for index in batch:
            losses = yield index
            found.append(Observation(index=index, losses_bp=losses.tolist()))
        observations += found
        batch = suggest(
            problem.pool,
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
