"""What comes out of a run: the Pareto set of what was confirmed, and whether it helps."""

from typing import Any, Final

from kvserve_api.errors import InfeasibleError
from kvserve_api.profile_set import NONE, ModelIdentity, ParetoSet
from kvserve_api.run import RunInputs
from kvserve_profiler.fronts import best
from kvserve_profiler.quality import MeasurementError
from kvserve_profiler.task import BUNDLE_KEY, Task
from kvserve_profiler.trials import Phase, TrialLog

HELD_OUT: Final = "held out"
SEEN: Final = "those of the search: the text is too short for others"
"""In the provenance of a set: what windows its losses were measured on."""
UNCALIBRATED: Final = "none"
"""In the provenance of a set's calibration: why there is none."""


def pareto_set(task: Task, log: TrialLog) -> ParetoSet:
    """Return the result of finished trials; a function of task and log alone.

    Raises:
        MeasurementError: The raw profile could not be measured.
    """
    raw = next((trial for trial in reversed(log.trials) if trial.name == NONE), None)
    if raw is None or raw.measurement is None:
        why = raw.error if raw else "it was not tried"
        raise MeasurementError(f"the profile {NONE!r} could not be measured: {why}")
    native_bytes = raw.measurement.native_bytes
    return ParetoSet(
        model=ModelIdentity(
            name=task.inputs.model,
            revision=task.inputs.revision,
            fingerprint=task.identity.fingerprint,
        ),
        device=task.device,
        classes={name: best(task, log, name) for name in task.texts},
        provenance={
            "inputs": task.inputs.digest,
            "image": task.inputs.image,
            "texts": {name: text.digest for name, text in task.texts.items()},
            "windows": {name: _windows(log, text.digest) for name, text in task.texts.items()},
            **_tasks(task, log),
            **({} if task.inputs.space.whole else {"space": task.inputs.space.to_json()}),
            "basis": dict(log.basis),
            "calibration": _calibration(task),
            "codec_time_bytes": native_bytes,
            "trials": {
                "completed": sum(t.measurement is not None for t in log.of(Phase.SEARCH)),
                "confirmed": sum(t.measurement is not None for t in log.of(Phase.CONFIRM)),
                "failed": {t.name: t.error for t in log.trials if t.error},
                "duration_s": round(sum(trial.duration_s for trial in log.trials), 3),
            },
            "screened": _screened(log),
        },
    )


def require_feasible(inputs: RunInputs, result: ParetoSet) -> None:
    """Refuse a result in which some class has no profile but the raw one within its budget.

    Raises:
        InfeasibleError: It names the classes, their budgets and the least lossy profiles.
    """
    problems = []
    for name, wanted in inputs.classes.items():
        lossy = [p for p in result.profiles(name) if p.name != NONE]
        if any(wanted.budget.admits(profile) for profile in lossy):
            continue
        found = "no strategy could be measured"
        if lossy:
            least = min(lossy, key=lambda p: (p.loss_upper_bp, p.name))
            found = f"the least lossy, {least.name}, may lose {least.loss_upper_bp:.1f}"
            if told := wanted.budget.told(least):
                found += f", and {told}"
        problems.append(f"class {name}: budget {wanted.max_loss_bp} basis points, {found}")
    if problems:
        raise InfeasibleError(
            f"{'; '.join(problems)}: raise maxLossBasisPoints, or accept uncompressed transfers"
        )


def _windows(log: TrialLog, text: str) -> str:
    measured = [t.measurement for t in log.of(Phase.CONFIRM) if t.measurement is not None]
    again = any(text in measurement.seen for measurement in measured)
    return SEEN if again else HELD_OUT


def _tasks(task: Task, log: TrialLog) -> dict[str, Any]:
    """Return of each class's tasks what was asked, and how often the exact cache answers rightly."""
    exact = {t.task: t.score.exact for t in log.of(Phase.TASK) if t.score is not None}
    told = {
        name: {
            check: {
                "digest": asked.digest,
                "items": len(asked.items),
                "exact": exact.get(asked.key),
            }
            for check, asked in checks.items()
        }
        for name, checks in task.checks.items()
        if checks
    }
    return {"tasks": told} if told else {}


def _screened(log: TrialLog) -> dict[str, int]:
    found = [] if log.screening is None else list(log.screening.found.values())
    return {"candidates": len(found), "refused": sum(cheap is None for cheap in found)}


def _calibration(task: Task) -> dict[str, Any]:
    if task.bundle is None:
        return {UNCALIBRATED: task.uncalibrated}
    return {BUNDLE_KEY: task.bundle.digest, **task.bundle.provenance}
