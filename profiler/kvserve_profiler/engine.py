"""A profiling run: measure one strategy after the other, then keep those that no other beats."""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from opentelemetry import metrics, trace

from kvserve_api.errors import InfeasibleError, KVServeError
from kvserve_api.otel import counter
from kvserve_api.profile_set import NONE, ModelIdentity, ParetoSet, Profile
from kvserve_api.run import Progress, RunInputs
from kvserve_api.telemetry import (
    ATTR_OUTCOME,
    ATTR_POLICY,
    ATTR_PROFILE,
    PROFILE_TRIALS,
    SPAN_PROFILE_RUN,
    SPAN_PROFILE_TRIAL,
)
from kvserve_profiler.bench import Bench
from kvserve_profiler.candidates import Candidate, suggest
from kvserve_profiler.codec import Codec
from kvserve_profiler.cost import device_kind
from kvserve_profiler.identity import Identity, identify
from kvserve_profiler.model import Model, Source
from kvserve_profiler.pareto import front
from kvserve_profiler.quality import MeasurementError
from kvserve_profiler.settings import Settings
from kvserve_profiler.texts import Text, unique
from kvserve_profiler.trials import Trial, TrialLog
from kvserve_strategies import config_needs_bundle
from kvserve_strategies.bundle import Bundle

Report: TypeAlias = Callable[[Progress, TrialLog], None]

BUNDLE_KEY: Final = "bundle"
"""In the basis of a trial log: the digest of the calibration bundle that its trials used."""
UNCALIBRATED: Final = "none"
"""In the provenance of a set's calibration: why there is none."""

TOOLS: Final = ("kvserve", "torch", "transformers")
_tracer = trace.get_tracer(__name__)
_trials = counter(metrics.get_meter(__name__), PROFILE_TRIALS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to profile, and how.

    Attributes:
        inputs: What was asked for.
        source: Where the model is.
        texts: The evaluation text of each workload class.
        space: The strategies that may be measured.
        settings: How to measure.
        identity: Of the model.
        device: What the costs are measured on.
        calibration: What the bundle is made with; empty without one.
        bundle: The model's calibration; None until it was made, and if there is none.
        uncalibrated: Why there is none, for people; empty otherwise.
    """

    inputs: RunInputs
    source: Source
    texts: Mapping[str, Text]
    space: tuple[Candidate, ...]
    settings: Settings
    identity: Identity
    device: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    bundle: Bundle | None = None
    uncalibrated: str = ""

    @classmethod
    def of(
        cls,
        inputs: RunInputs,
        source: Source,
        texts: Mapping[str, Text],
        space: Sequence[Candidate],
        settings: Settings,
    ) -> "Task":
        """Return a task on this machine.

        Raises:
            SpecError: There is no model.
            UnsupportedError: The model has no plain KV cache.
        """
        return cls(
            inputs=inputs,
            source=source,
            texts=texts,
            space=tuple(space),
            settings=settings,
            identity=identify(source),
            device=device_kind(),
        )

    def calibrated_by(self, recipe: Mapping[str, Any]) -> "Task":
        """Return the task with what its bundle will be made with."""
        return replace(self, calibration=recipe)

    def with_bundle(self, bundle: Bundle) -> "Task":
        """Return the task with the model's calibration."""
        return replace(self, bundle=bundle)

    def without_bundle(self, why: str) -> "Task":
        """Return the task without the strategies that need a calibration."""
        space = tuple(candidate for candidate in self.space if not candidate.calibrated)
        return replace(self, space=space, uncalibrated=why)

    @property
    def total(self) -> int:
        """How many strategies the run measures."""
        return min(self.inputs.max_trials, len(self.space))

    def log(self) -> TrialLog:
        """Return the empty trial log of the task."""
        calibration: dict[str, Any] = (
            {} if self.bundle is None else {BUNDLE_KEY: self.bundle.digest}
        )
        if self.calibration:
            calibration["calibration"] = dict(self.calibration)
        return TrialLog(
            basis=calibration
            | {
                "fingerprint": self.identity.fingerprint,
                "weights": self.identity.weights,
                "texts": sorted(unique(self.texts)),
                "settings": self.settings.to_json(),
                "device": self.device,
                "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
            }
        )


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
        bench: Bench | None = None
        while candidate := suggest(task.space, log.measured, task.inputs.max_trials):
            if bench is None:
                report(_progress(task, log, "loading the model"), log)
                bench = Bench(Model(task.source), unique(task.texts), task.settings)
            report(_progress(task, log, f"measuring {candidate.name}"), log)
            log = log.plus(run_trial(bench, candidate, task.identity.fingerprint, task.bundle))
            report(_progress(task, log), log)
        return pareto_set(task, log)


def run_trial(
    bench: Bench, candidate: Candidate, fingerprint: str, bundle: Bundle | None = None
) -> Trial:
    """Measure one strategy; a strategy that can't be measured gives a failed trial."""
    start_s = time.perf_counter()
    with _tracer.start_as_current_span(
        SPAN_PROFILE_TRIAL, attributes={ATTR_PROFILE: candidate.name}
    ) as span:
        measurement, error = None, ""
        try:
            codec = Codec.of(
                candidate.strategy,
                fingerprint=fingerprint,
                layout=bench.layout,
                bundle=bundle if candidate.calibrated else None,
            )
            measurement = bench.measure(codec)
        # a strategy may fail in any numeric way; that is news about the strategy, not about the run
        except (KVServeError, ArithmeticError, RuntimeError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            span.record_exception(failure)
        outcome = "failed" if error else "completed"
        span.set_attribute(ATTR_OUTCOME, outcome)
    _trials.add(1, {ATTR_OUTCOME: outcome})
    return Trial(
        name=candidate.name,
        strategy=candidate.strategy,
        duration_s=time.perf_counter() - start_s,
        measurement=measurement,
        error=error,
    )


def pareto_set(task: Task, log: TrialLog) -> ParetoSet:
    """Return the result of finished trials; a function of task and log alone.

    Raises:
        MeasurementError: The raw profile could not be measured.
    """
    raw = next((trial for trial in log.trials if trial.name == NONE), None)
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
                "completed": sum(trial.measurement is not None for trial in log.trials),
                "failed": {t.name: t.error for t in log.trials if t.measurement is None},
                "duration_s": round(sum(trial.duration_s for trial in log.trials), 3),
            },
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


def _calibration(task: Task) -> dict[str, Any]:
    if task.bundle is None:
        return {UNCALIBRATED: task.uncalibrated}
    return {BUNDLE_KEY: task.bundle.digest, **task.bundle.provenance}


def _profiles(task: Task, log: TrialLog, text_digest: str) -> list[Profile]:
    digest = None if task.bundle is None else task.bundle.digest
    profiles = []
    for trial in log.trials:
        if trial.measurement is None:
            continue
        quality = trial.measurement.qualities[text_digest]
        profiles.append(
            Profile(
                name=trial.name,
                strategy=trial.strategy,
                ratio=quality.ratio,
                loss_bp=quality.loss_bp,
                loss_upper_bp=quality.loss_upper_bp,
                encode=trial.measurement.encode,
                decode=trial.measurement.decode,
                lossless=trial.measurement.lossless,
                bundle=digest if config_needs_bundle(trial.strategy) else None,
            )
        )
    return profiles


def _progress(task: Task, log: TrialLog, message: str = "") -> Progress:
    failed = sum(trial.measurement is None for trial in log.trials)
    return Progress(
        completed=len(log.trials) - failed, failed=failed, total=task.total, message=message
    )
