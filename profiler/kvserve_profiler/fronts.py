"""The profiles of a run's result, and what must still be asked of them.

Divergence is cheap and leads the search; answers are dear, and nobody searches by them. So tasks are asked of what the
search found and what was confirmed on windows held out, and of no more of it than the result needs: of what no other
beats, and, where that fails a task's budget, of what no other beats among those that did not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvserve_api.profile_set import Profile
from kvserve_api.quality import TaskScore
from kvserve_profiler.pareto import front
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.items import TaskSet
from kvserve_profiler.trials import Phase, Trial, TrialLog
from kvserve_strategies import config_needs_bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A task that a profile has not answered.

    Attributes:
        name: The task's name in the first class that asks it.
        asked: The task.
        profile: Who is to answer.
    """

    name: str
    asked: TaskSet
    profile: Profile


def best(task: Task, log: TrialLog, name: str) -> tuple[Profile, ...]:
    """Return the profiles of a workload class's result, by falling ratio.

    Those that no other beats, whatever they answer, because budgets of tasks may be raised later; and those that no
    other beats that keeps the budgets of the tasks.
    """
    profiles = _profiles(task, log, name)
    native_bytes = _native_bytes(log)
    kept = {p.name for p in front(profiles, native_bytes)}
    kept |= {p.name for p in front(_not_failed(task, log, name, profiles), native_bytes)}
    return tuple(sorted((p for p in profiles if p.name in kept), key=lambda p: (-p.ratio, p.name)))


def unanswered(task: Task, log: TrialLog) -> list[Question]:
    """Return what is to be asked next, task by task; empty when the result is known.

    What is answered may make further profiles worth asking: call it again then.
    """
    answers = log.answers()
    found: dict[tuple[str, str], Question] = {}
    for name, checks in task.checks.items():
        profiles = [] if not checks else best(task, log, name)
        for check, asked in checks.items():
            for profile in profiles:
                key = (asked.key, profile.strategy.digest)
                if profile.lossless or key[::-1] in answers:
                    continue
                found.setdefault(key, Question(name=check, asked=asked, profile=profile))
    return sorted(found.values(), key=lambda q: (q.asked.key, -q.profile.ratio, q.profile.name))


def _not_failed(task: Task, log: TrialLog, name: str, profiles: list[Profile]) -> list[Profile]:
    """Return the profiles that no answer so far speaks against."""
    answers, checks = log.answers(), task.checks.get(name, {})
    budgets = task.inputs.classes[name].budget

    def failed(profile: Profile) -> bool:
        asked = {
            check for check in checks if (profile.strategy.digest, checks[check].key) in answers
        }
        return bool(asked & budgets.failed_tasks(profile).keys())

    return [profile for profile in profiles if not failed(profile)]


def _profiles(task: Task, log: TrialLog, name: str) -> list[Profile]:
    """Return what was confirmed, as profiles of a workload class."""
    digest = None if task.bundle is None else task.bundle.digest
    found = []
    for trial in log.of(Phase.CONFIRM):
        measurement = trial.measurement
        if measurement is None or measurement.encode is None or measurement.decode is None:
            continue
        quality = measurement.qualities[task.texts[name].digest]
        found.append(
            Profile(
                name=trial.name,
                strategy=trial.strategy,
                ratio=quality.ratio,
                loss_bp=quality.loss_bp,
                loss_upper_bp=quality.loss_upper_bp,
                encode=measurement.encode,
                decode=measurement.decode,
                lossless=measurement.lossless,
                bundle=digest if config_needs_bundle(trial.strategy) else None,
                tasks=_scores(log, trial, task.checks.get(name, {})),
            )
        )
    return found


def _scores(log: TrialLog, trial: Trial, checks: Mapping[str, TaskSet]) -> dict[str, TaskScore]:
    answers = log.answers()
    scores = {
        name: answers.get((trial.strategy.digest, asked.key)) for name, asked in checks.items()
    }
    return {name: score for name, score in scores.items() if score is not None}


def _native_bytes(log: TrialLog) -> int:
    """Return the size of the transfer whose codec time counts; the same in all trials."""
    return next((t.measurement.native_bytes for t in log.trials if t.measurement is not None), 1)
