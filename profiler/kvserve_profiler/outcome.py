"""What comes out of a run: the Pareto set of what was confirmed, and whether it helps."""

from typing import Any, Final

from kvserve_api.errors import InfeasibleError
from kvserve_api.profile_set import NONE, ModelIdentity, ParetoSet, Profile
from kvserve_api.run import RunInputs
from kvserve_profiler.pareto import front
from kvserve_profiler.quality import MeasurementError
from kvserve_profiler.task import BUNDLE_KEY, Task
from kvserve_profiler.trials import Phase, TrialLog
from kvserve_strategies import config_needs_bundle

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
        classes={
            name: front(_profiles(task, log, text.digest), native_bytes)
            for name, text in task.texts.items()
        },
        provenance={
            "inputs": task.inputs.digest,
            "image": task.inputs.image,
            "texts": {name: text.digest for name, text in task.texts.items()},
            "basis": dict(log.basis),
            "calibration": _calibration(task),
            "codec_time_bytes": native_bytes,
            "trials": {
                "completed": sum(t.measurement is not None for t in log.of(Phase.SEARCH)),
                "confirmed": sum(t.measurement is not None for t in log.of(Phase.CONFIRM)),
                "failed": {t.name: t.error for t in log.trials if t.measurement is None},
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
        losses = [(p.loss_upper_bp, p.name) for p in result.profiles(name) if p.name != NONE]
        if losses and min(losses)[0] <= wanted.max_loss_bp:
            continue
        best = "no strategy could be measured"
        if losses:
            best = f"the least lossy, {min(losses)[1]}, may lose {min(losses)[0]:.1f}"
        problems.append(f"class {name}: budget {wanted.max_loss_bp} basis points, {best}")
    if problems:
        raise InfeasibleError(
            f"{'; '.join(problems)}: raise maxLossBasisPoints, or accept uncompressed transfers"
        )


def _screened(log: TrialLog) -> dict[str, int]:
    found = [] if log.screening is None else list(log.screening.found.values())
    return {"candidates": len(found), "refused": sum(cheap is None for cheap in found)}


def _calibration(task: Task) -> dict[str, Any]:
    if task.bundle is None:
        return {UNCALIBRATED: task.uncalibrated}
    return {BUNDLE_KEY: task.bundle.digest, **task.bundle.provenance}


def _profiles(task: Task, log: TrialLog, text_digest: str) -> list[Profile]:
    digest = None if task.bundle is None else task.bundle.digest
    profiles = []
    for trial in log.of(Phase.CONFIRM):
        measurement = trial.measurement
        if measurement is None or measurement.encode is None or measurement.decode is None:
            continue
        quality = measurement.qualities[text_digest]
        profiles.append(
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
            )
        )
    return profiles
