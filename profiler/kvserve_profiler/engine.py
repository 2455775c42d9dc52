"""A profiling run: search the strategy space, measure what survived on windows held out, keep what no other beats."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Self, TypeAlias

import torch
from opentelemetry import trace

from kvserve_api.errors import SpecError
from kvserve_api.profile_set import NONE, ParetoSet
from kvserve_api.progress import Progress
from kvserve_api.telemetry import ATTR_POLICY, SPAN_PROFILE_RUN
from kvserve_profiler.attempts import run_question, run_trial
from kvserve_profiler.bench import Bench
from kvserve_profiler.candidates import Candidate, gather
from kvserve_profiler.codec import Codec
from kvserve_profiler.crew import Alone, Crew, Item, Work
from kvserve_profiler.fronts import unanswered
from kvserve_profiler.model import Model
from kvserve_profiler.narrowing import narrow
from kvserve_profiler.outcome import pareto_set
from kvserve_profiler.patience import Patience
from kvserve_profiler.plan import Plan, search_is_over, unconfirmed
from kvserve_profiler.screening import Screening, screen
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.bench import Examiner
from kvserve_profiler.tasks.items import TaskSet
from kvserve_profiler.texts import unique
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog

Report: TypeAlias = Callable[[Progress, TrialLog], None]

POLL_S: Final = 1.0
"""Between two looks at what helpers have brought."""
SCREENED_A_REPORT: Final = 25
"""Candidates between two reports of the screening's progress."""
_tracer = trace.get_tracer(__name__)


def profile(task: Task, log: TrialLog, report: Report, crew: Crew | None = None) -> ParetoSet:
    """Do a run, or what is left of it.

    Args:
        task: What to do.
        log: The task's log, with the trials of an earlier, killed run of it.
        report: Called at the start, with each step and with each finished trial.
        crew: Other pods that measure too; None without any.

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
        run = Run.of(task, report, crew or Alone())
        task = run.task
        log = run.ask(run.confirm(run.search(run.screen(log))))
        return pareto_set(task, log)


@dataclass(frozen=True, slots=True)
class Run:
    """The steps of a run; each takes the log and returns it with what it added."""

    task: Task
    bench: Bench
    examiner: Examiner
    candidates: tuple[Candidate, ...]
    report: Report
    crew: Crew = field(default_factory=Alone)

    @classmethod
    def of(cls, task: Task, report: Report, crew: Crew) -> Self:
        """Load the model and list the candidates.

        Raises:
            SpecError: The model can't be loaded, a text is too short, or the limits leave no strategy.
            UnsupportedError: The model has no plain KV cache.
        """
        model = Model(task.source)
        points = () if task.grid is None else task.grid(model.layout, task.bundle)
        task, points = limit(task, points)
        return cls(
            task,
            Bench(model, unique(task.texts), task.settings),
            Examiner(model, confidence_percent=task.settings.confidence_percent),
            gather(task.space, points, max_trials=task.inputs.max_trials, seed=task.inputs.seed),
            report,
            crew,
        )

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

        def latest() -> TrialLog:
            return log

        while True:
            with _one_thread(self.task.settings.threads):
                batch = plan.next(log)
            if not batch:
                return log
            begun = plan.begun(log)
            items = [Item(phase=Phase.SEARCH, name=c.name, strategy=c.strategy) for c in batch]
            for trial in self._in_order(latest, begun, items):
                log = log.plus(trial)
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

        def latest() -> TrialLog:
            return log

        while questions := unanswered(self.task, log):
            items = [
                Item(
                    phase=Phase.TASK,
                    name=question.profile.name,
                    strategy=question.profile.strategy,
                    task=question.asked.key,
                )
                for question in questions
            ]
            for _, trial in self._together(latest, len(log.of(Phase.SEARCH)), items):
                log = log.plus(trial)
                self.report(_progress(self.task, log), log)
        return log

    def do(self, log: TrialLog, searched: int, item: Item) -> Trial:
        """Measure one thing, whoever decided it.

        Args:
            log: The log, with at least what was known when it was decided.
            searched: Trials of the search that were known then.
            item: What to measure.
        """
        candidate = Candidate(name=item.name, strategy=item.strategy)
        if item.phase == Phase.TASK:
            name, asked = self._asked(item.task)
            self.report(_progress(self.task, log, f"asking {name} of {item.name}"), log)
            return run_question(
                candidate, item.task, lambda: self.examiner.score(self._codec(candidate), asked)
            )
        self.report(_progress(self.task, log, f"measuring {item.name}"), log)
        plan = Plan.of(self.task, self.candidates, log)
        known = log.searched(searched)
        return run_trial(candidate, Phase.SEARCH, self._try(plan, known, candidate))

    def _in_order(
        self, latest: Callable[[], TrialLog], searched: int, items: Sequence[Item]
    ) -> Iterator[Trial]:
        """Yield the trials of a batch in its order, so that the log does not depend on who was faster."""
        early: dict[int, Trial] = {}
        following = 0
        for position, trial in self._together(latest, searched, items):
            early[position] = trial
            while following in early:
                yield early.pop(following)
                following += 1

    def _together(
        self, latest: Callable[[], TrialLog], searched: int, items: Sequence[Item]
    ) -> Iterator[tuple[int, Trial]]:
        """Yield the trials of some items, measured here or by others, as they come, with their positions.

        The log is asked for anew each time: the caller adds to it what was yielded.
        """
        work = Work(searched=searched, items=tuple(items))
        self.crew.offer(latest(), work)
        left = dict(enumerate(items))
        patience = Patience()
        while left:
            for trial in self.crew.found():
                for position in [p for p, item in left.items() if item.is_of(trial)]:
                    del left[position]
                    yield position, trial
            if not left:
                return
            mine = [p for p in left if p % self.crew.pods not in self.crew.present]
            if not mine and not patience.over:
                time.sleep(POLL_S)
                continue
            if not mine:
                for index in {p % self.crew.pods for p in left}:
                    self.crew.give_up(index)
            position = mine[0] if mine else min(left)
            trial = self.do(latest(), searched, left.pop(position))
            patience = patience.after(trial.duration_s)
            yield position, trial

    def _asked(self, key: str) -> tuple[str, TaskSet]:
        """Return the task of a key, with its name in the first class that has it."""
        for checks in self.task.checks.values():
            for name, asked in checks.items():
                if asked.key == key:
                    return name, asked
        raise SpecError("task", f"{key} is none of the run's: the items of the pods differ")

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
