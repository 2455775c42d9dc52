"""What a run does next, as a function of its task and its log: which strategy to try, and which to confirm."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvserve_profiler.candidates import ALWAYS, Candidate
from kvserve_profiler.pareto import non_dominated
from kvserve_profiler.pool import FloatArray, Observation, Pool
from kvserve_profiler.screening import Cheap
from kvserve_profiler.search import suggest, worth_more
from kvserve_profiler.task import Task
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog
from kvserve_strategies.peers import PEERS

BATCH: Final = 2
"""Trials between two fits of the model: a fit costs a part of a trial."""
HEADROOM: Final = 4.0
"""Times the budget up to which losses get into the set: a budget may be raised without a new run."""
USUAL_MARGIN: Final = 1.3
"""The upper limit of a loss over the loss itself, before any trial told."""
LEAST_BUDGET_BP: Final = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The search of a run. Made for one screening.

    Attributes:
        task: What to do.
        candidates: Those that were screened, the named ones first.
        pool: Those of them that can be coded.
        indices: For each in the pool, by digest of the strategy, where.
        usable: For each in the pool, which candidate.
    """

    task: Task
    candidates: tuple[Candidate, ...]
    pool: Pool
    indices: Mapping[str, int]
    usable: tuple[Candidate, ...]

    @classmethod
    def of(cls, task: Task, candidates: Sequence[Candidate], log: TrialLog) -> "Plan":
        """Return the plan of a screened log."""
        assert log.screening is not None
        found = [(c, cheap) for c in candidates if (cheap := log.screening.of(c.strategy))]
        # what other projects do is seldom on the front: a search may find it, and does not begin with it
        starts = {c.strategy.digest for c in task.space if c.name not in PEERS}
        width = len(candidates[0].features) if candidates else 0
        pool = Pool(
            features=np.array([c.features for c, _ in found]).reshape(len(found), width),
            ratio=np.array([cheap.ratio for _, cheap in found]),
            codec_s=np.array([cheap.codec_s for _, cheap in found]),
            forecast=_forecast([cheap for _, cheap in found]),
            starts=np.array([c.strategy.digest in starts for c, _ in found], dtype=bool),
        )
        usable = tuple(c for c, _ in found)
        indices = {c.strategy.digest: index for index, c in enumerate(usable)}
        return cls(task, tuple(candidates), pool, indices, usable)

    def next(self, log: TrialLog) -> list[Candidate]:
        """Return the strategies to try next: what is left of a batch; none when the search is over."""
        tried = log.measured(Phase.SEARCH)
        room = self.task.inputs.max_trials - len(tried)
        if room <= 0:
            return []
        first = [c for c in self.candidates if c.name in ALWAYS]
        if untried := [c for c in first if c.strategy.digest not in tried]:
            return untried[:room]
        # a batch is a function of what was known when it began, so that a run killed inside it finds it again
        begun = self.begun(log)
        known = self.observations(log.of(Phase.SEARCH)[:begun])
        chosen = suggest(
            self.pool,
            known,
            seed=self.task.inputs.seed,
            batch=self.batch,
            budgets_bp=self.budgets_bp(log.of(Phase.SEARCH)[:begun]),
        )
        # named strategies that could not be coded come last, and say why
        uncoded = [c for c in self.task.space if c.strategy.digest not in self.indices]
        for some in ([self.usable[index] for index in chosen], uncoded):
            if rest := [c for c in some if c.strategy.digest not in tried]:
                return rest[:room]
        return []

    @property
    def batch(self) -> int:
        """Trials of a batch."""
        return max(BATCH, self.task.inputs.parallelism)

    def begun(self, log: TrialLog) -> int:
        """Return how many trials were known when the batch began that is being tried."""
        first = sum(c.name in ALWAYS for c in self.candidates)
        tried = len(log.measured(Phase.SEARCH))
        return tried if tried < first else tried - (tried - first) % self.batch

    def observations(self, trials: Sequence[Trial]) -> list[Observation]:
        """Return what trials of the search tell about the pool."""
        seen = []
        for trial in trials:
            index = self.indices.get(trial.strategy.digest)
            if index is not None:
                seen.append(Observation(index=index, losses_bp=_losses(self.task, trial)))
        return seen

    def budgets_bp(self, trials: Sequence[Trial]) -> list[float]:
        """Return for each text which loss has an upper limit about as large as the budget."""
        return [
            max(budget_bp / _margin(trials, text), LEAST_BUDGET_BP)
            for text, budget_bp in self.task.budgets_bp.items()
        ]

    def worth_more(
        self, log: TrialLog, candidate: Candidate, losses_bp: Mapping[str, Sequence[float]]
    ) -> bool:
        """Tell whether a candidate's losses on some windows leave it a chance to be of use."""
        index = self.indices.get(candidate.strategy.digest)
        if index is None:
            return True
        trials = log.of(Phase.SEARCH)
        partial = Observation(
            index=index, losses_bp=[list(losses_bp[text]) for text in self.task.budgets_bp]
        )
        return worth_more(
            self.pool, self.observations(trials), partial, budgets_bp=self.budgets_bp(trials)
        )


def search_is_over(task: Task, log: TrialLog) -> bool:
    """Tell, without a model, whether the log has all trials of the search."""
    if log.screening is None:
        return False
    named = {c.strategy.digest for c in task.space if log.screening.of(c.strategy) is None}
    there = len(named) + sum(cheap is not None for cheap in log.screening.found.values())
    return len(log.measured(Phase.SEARCH)) >= min(task.inputs.max_trials, there)


def survivors(task: Task, log: TrialLog) -> list[Trial]:
    """Return the trials of the search whose strategies are to be confirmed.

    That is, for each text, those that no other beats and that lose no more than some budgets, the one that loses least,
    and those that every set has.
    """
    trials = [trial for trial in log.of(Phase.SEARCH) if trial.measurement is not None]
    kept = {trial.name for trial in trials if trial.name in ALWAYS}
    for text, budget_bp in task.budgets_bp.items():
        points = {trial.name: _point(log, trial, text) for trial in trials}
        lossy = {name: p for name, p in points.items() if name not in ALWAYS}
        limit_bp = HEADROOM * max(budget_bp, LEAST_BUDGET_BP)
        kept |= {name for name in non_dominated(points) if points[name][1] <= limit_bp}
        kept |= {min(lossy, key=lambda name: lossy[name][1])} if lossy else set()
    return [trial for trial in trials if trial.name in kept]


def unconfirmed(task: Task, log: TrialLog) -> list[Trial]:
    """Return the survivors that were not measured again yet."""
    done = log.measured(Phase.CONFIRM)
    return [trial for trial in survivors(task, log) if trial.strategy.digest not in done]


def _point(log: TrialLog, trial: Trial, text: str) -> tuple[float, float, float]:
    assert trial.measurement is not None
    quality = trial.measurement.qualities[text]
    cheap = log.screening.of(trial.strategy) if log.screening else None
    return (-quality.ratio, quality.loss_bp, cheap.codec_s if cheap else float("inf"))


def _forecast(found: Sequence[Cheap]) -> FloatArray | None:
    """Return ``[n, texts, 2]`` forecasts in basis points; None unless there are some of all."""
    if not found or not all(cheap.forecast_bp for cheap in found):
        return None
    return np.array([cheap.forecast_bp for cheap in found]).reshape(len(found), -1, 2)


def _losses(task: Task, trial: Trial) -> list[list[float]]:
    if trial.measurement is None:
        return []
    return [list(trial.measurement.qualities[text].windows_bp) for text in task.budgets_bp]


def _margin(trials: Sequence[Trial], text: str) -> float:
    """Return how much larger than a loss its upper limit usually is."""
    measured: list[Measurement] = [t.measurement for t in trials if t.measurement is not None]
    qualities = [measurement.qualities[text] for measurement in measured]
    most = max((len(quality.windows_bp) for quality in qualities), default=0)
    margins = [
        quality.loss_upper_bp / quality.loss_bp
        for quality in qualities
        if quality.loss_bp > 0 and len(quality.windows_bp) == most
    ]
    return statistics.median(margins) if len(margins) > 2 else USUAL_MARGIN
