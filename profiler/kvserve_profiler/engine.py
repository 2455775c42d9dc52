"""A profiling run: search the strategy space, measure what survived on windows held out, keep what no other beats."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, TypeVar

import torch
from opentelemetry import metrics, trace

from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.otel import counter
from kvserve_api.profile_set import NONE, ParetoSet
from kvserve_api.quality import TaskScore
from kvserve_api.run import Progress
from kvserve_api.telemetry import (
    ATTR_OUTCOME,
    ATTR_POLICY,
    ATTR_PROFILE,
    PROFILE_TRIALS,
    SPAN_PROFILE_RUN,
    SPAN_PROFILE_TRIAL,
)
from kvserve_profiler.bench import Bench
from kvserve_profiler.candidates import Candidate, gather
from kvserve_profiler.codec import Codec
from kvserve_profiler.fronts import unanswered
from kvserve_profiler.model import Model
from kvserve_profiler.narrowing import narrow
from kvserve_profiler.outcome import pareto_set
from kvserve_profiler.plan import Plan, search_is_over, unconfirmed
from kvserve_profiler.screening import Screening, screen
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.bench import Examiner
from kvserve_profiler.texts import unique
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog

T = TypeVar("T")
Report: TypeAlias = Callable[[Progress, TrialLog], None]

SCREENED_A_REPORT: Final = 25
"""Candidates between two reports of the screening's progress."""
_tracer = trace.get_tracer(__name__)
_trials = counter(metrics.get_meter(__name__), PROFILE_TRIALS)


def profile(task: Task, log: TrialLog, report: Report) -> ParetoSet:
    """Do a run, or what is left of it.

    Args:
        task: What to do.
        log: The task's log, with the trials of an earlier, killed run of it.
        report: Called at the start, with each step and with each finished trial.

    Raises:
        SpecError: The model can't be loaded, or a text is too short.
        UnsupportedError: The model has no plain KV cache.
        MeasurementError: Not even the raw profile could be measured.
    """
    with _tracer.start_as_current_span(
        SPAN_PROFILE_RUN, attributes={ATTR_POLICY: task.inputs.policy}
    ):
        over = search_is_over(task, log) and not unconfirmed(task, log)
        if over and not unanswered(task, log):
            return pareto_set(task, log)
        report(_progress(task, log, "loading the model"), log)
        model = Model(task.source)
        points = () if task.grid is None else task.grid(model.layout, task.bundle)
        task, points = limit(task, points)
        run = _Run(
            task,
            Bench(model, unique(task.texts), task.settings),
            Examiner(model, confidence_percent=task.settings.confidence_percent),
            gather(task.space, points, max_trials=task.inputs.max_trials, seed=task.inputs.seed),
            report,
        )
        log = run.ask(run.confirm(run.search(run.screen(log))))
        return pareto_set(task, log)


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps of a run; each takes the log and returns it with what it added."""

    task: Task
    bench: Bench
    examiner: Examiner
    candidates: tuple[Candidate, ...]
    report: Report

    def screen(self, log: TrialLog) -> TrialLog:
        """Screen the candidates that were not."""
        candidates = self.candidates
        known = Screening({}) if log.screening is None else log.screening
        missing = [c for c in candidates if c.strategy not in known]
        if not missing:
            return log

        def tell(done: int) -> None:
            if done % SCREENED_A_REPORT == 0:
                step = f"screening candidates {done}/{len(missing)}"
                self.report(_progress(self.task, log, step), log)

        native_bytes = self.bench.layout.native_bytes(self.bench.sample.tokens)
        by_text = self.bench.probes()
        probes = [by_text[text] for text in self.task.budgets_bp]
        found = screen(missing, self._codec, probes, native_bytes, tell).found
        log = log.screened(Screening({**known.found, **found}))
        self.report(_progress(self.task, log), log)
        return log

    def search(self, log: TrialLog) -> TrialLog:
        """Try strategies as the search suggests them, one after the other."""
        plan = Plan.of(self.task, self.candidates, log)
        while True:
            with _one_thread(self.task.settings.threads):
                batch = plan.next(log)
            if not batch:
                return log
            for candidate in batch:
                self.report(_progress(self.task, log, f"measuring {candidate.name}"), log)
                log = log.plus(run_trial(candidate, Phase.SEARCH, self._try(plan, log, candidate)))
                self.report(_progress(self.task, log), log)

    def confirm(self, log: TrialLog) -> TrialLog:
        """Measure the survivors of the search on what it has not seen."""
        waiting = unconfirmed(self.task, log)
        for number, trial in enumerate(waiting, start=1):
            step = f"confirming {trial.name} ({number} of {len(waiting)})"
            self.report(_progress(self.task, log, step), log)
            candidate = Candidate(name=trial.name, strategy=trial.strategy)
            log = log.plus(
                run_trial(
                    candidate,
                    Phase.CONFIRM,
                    lambda candidate=candidate: self.bench.measure(self._codec(candidate)),  # type: ignore[misc]
                )
            )
            self.report(_progress(self.task, log), log)
        return log

    def ask(self, log: TrialLog) -> TrialLog:
        """Let the profiles of the result answer the tasks of their workload classes."""
        while questions := unanswered(self.task, log):
            for number, question in enumerate(questions, start=1):
                profile, asked = question.profile, question.asked
                step = f"asking {question.name} of {profile.name} ({number} of {len(questions)})"
                self.report(_progress(self.task, log, step), log)
                candidate = Candidate(name=profile.name, strategy=profile.strategy)
                log = log.plus(
                    run_question(
                        candidate,
                        asked.key,
                        lambda c=candidate, a=asked: self.examiner.score(self._codec(c), a),  # type: ignore[misc]
                    )
                )
                self.report(_progress(self.task, log), log)
        return log

    def _try(self, plan: Plan, log: TrialLog, candidate: Candidate) -> Callable[[], Measurement]:
        def go_on(losses_bp: Mapping[str, Sequence[float]]) -> bool:
            return plan.worth_more(log, candidate, losses_bp)

        return lambda: self.bench.search(self._codec(candidate), go_on)

    def _codec(self, candidate: Candidate) -> Codec:
        return Codec.of(
            candidate.strategy,
            fingerprint=self.task.identity.fingerprint,
            layout=self.bench.layout,
            bundle=self.task.bundle if candidate.calibrated else None,
        )


def limit(task: Task, points: Sequence[Candidate]) -> tuple[Task, Sequence[Candidate]]:
    """Return the task with how much its limits leave of the strategy space, and that part of the space.

    Raises:
        SpecError: Nothing is left but the raw profile.
    """
    limits = task.inputs.space
    if limits.whole:
        return task, points
    left = narrow(limits, points)
    allowed = {c.strategy.digest for c in (*task.space, *left) if c.name != NONE}
    if not allowed:
        raise SpecError(
            "profiling.space", "leaves no strategy but none: allow or include more, or exclude less"
        )
    known = len({c.strategy.digest for c in points} | allowed)
    return replace(task, counts=(len(allowed), known)), left


def run_trial(candidate: Candidate, phase: Phase, measure: Callable[[], Measurement]) -> Trial:
    """Measure one strategy; a strategy that can't be measured gives a failed trial."""
    measurement, error, duration_s = _attempt(candidate, measure)
    return Trial(
        name=candidate.name,
        strategy=candidate.strategy,
        phase=phase,
        duration_s=duration_s,
        measurement=measurement,
        error=error,
    )


def run_question(candidate: Candidate, key: str, answer: Callable[[], TaskScore]) -> Trial:
    """Let one strategy answer a task; a prompt that the model does not take ends the run.

    Raises:
        SpecError: A prompt is too short or too long for the model.
    """
    score, error, duration_s = _attempt(candidate, answer, fatal=SpecError)
    return Trial(
        name=candidate.name,
        strategy=candidate.strategy,
        phase=Phase.TASK,
        duration_s=duration_s,
        task=key,
        score=score,
        error=error,
    )


def _attempt(
    candidate: Candidate, measure: Callable[[], T], *, fatal: type[Exception] | tuple[()] = ()
) -> tuple[T | None, str, float]:
    """Return what measuring gave, or why nothing, and the seconds it took."""
    start_s = time.perf_counter()
    with _tracer.start_as_current_span(
        SPAN_PROFILE_TRIAL, attributes={ATTR_PROFILE: candidate.name}
    ) as span:
        found, error = None, ""
        try:
            found = measure()
        except fatal:
            raise
        # a strategy may fail in any numeric way; that is news about the strategy, not about the run
        except (KVServeError, ArithmeticError, RuntimeError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            span.record_exception(failure)
        outcome = "failed" if error else "completed"
        span.set_attribute(ATTR_OUTCOME, outcome)
    _trials.add(1, {ATTR_OUTCOME: outcome})
    return found, error, time.perf_counter() - start_s


@contextmanager
def _one_thread(threads: int) -> Iterator[None]:
    """Let a search compute on one thread: it is small, and sums in one order give one suggestion."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(task: Task, log: TrialLog, message: str = "") -> Progress:
    trials = log.of(Phase.SEARCH)
    failed = sum(trial.measurement is None for trial in trials)
    allowed, known = task.counts or (None, None)
    total = task.total
    if log.screening is not None:
        # a space that was cut may have fewer strategies than there may be trials
        total = min(total, max(len(log.screening.found), len(trials)))
    return Progress(
        completed=len(trials) - failed,
        failed=failed,
        total=total,
        message=message,
        allowed=allowed,
        known=known,
    )
