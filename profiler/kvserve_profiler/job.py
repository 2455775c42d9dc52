"""The profiling Job: from the inputs that the operator mounted to the Pareto ConfigMap that the controller reads."""

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.names import CLAIMS_DIR, TASKS_DIR
from kvserve_api.profile_set import ParetoSet
from kvserve_api.progress import Progress
from kvserve_api.run import RunInputs
from kvserve_profiler.calibration import Calibration
from kvserve_profiler.candidates import Candidate, Grid
from kvserve_profiler.coalesce import Coalescer
from kvserve_profiler.configmaps import Owner, RunConfigMaps
from kvserve_profiler.crew import Work
from kvserve_profiler.engine import profile
from kvserve_profiler.exits import last_words
from kvserve_profiler.helpers import Helpers
from kvserve_profiler.model import Source
from kvserve_profiler.outcome import UNCALIBRATED, require_feasible
from kvserve_profiler.settings import Settings
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.sources import of_inputs as tasks_of_inputs
from kvserve_profiler.texts import of_inputs
from kvserve_profiler.trials import TrialLog
from kvserve_strategies.artifacts import open_store

MAX_INPUTS_BYTES: Final = 1024 * 1024
WRITE_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """What the operator gives a Job.

    Attributes:
        inputs: File with the run's inputs.
        texts: Folder with ``<class>.txt``.
        tasks: Folder with ``<class>.<task>.jsonl``.
        claims: Folder with a folder for each PersistentVolumeClaim that holds items of tasks.
        model: Folder of the model; empty for the hub.
        owner: The policy.
        artifacts: URL of the store of calibration bundles; empty to measure only what needs none.
        calibration_tokens: See `Calibration`.
        gradients: See `Settings`.
    """

    inputs: Path
    texts: Path
    tasks: Path = Path(TASKS_DIR)
    claims: Path = Path(CLAIMS_DIR)
    model: str
    owner: Owner
    artifacts: str = ""
    calibration_tokens: int | None = None
    gradients: int = 0

    def calibration(self) -> Calibration:
        """Return how the run is calibrated."""
        store = open_store(self.artifacts) if self.artifacts else None
        return Calibration(store=store, tokens=self.calibration_tokens)

    def task(self, inputs: RunInputs, space: Sequence[Candidate], grid: Grid | None = None) -> Task:
        """Return the run's task, not yet calibrated.

        Raises:
            SpecError: A text, an item or the model is missing, or not the one that was planned with.
            UnsupportedError: The model can't be profiled.
        """
        texts = of_inputs(inputs, self.texts)
        checks = tasks_of_inputs(inputs, self.tasks, self.claims)
        source = Source(location=self.model or inputs.model, revision=inputs.revision)
        settings = Settings(seed=inputs.seed, gradients=self.gradients)
        task = Task.of(inputs, source, texts, space, settings, grid)
        return task.checked_by(checks)


@dataclass(kw_only=True, slots=True)
class State:
    """The last report of a run, for its last words."""

    progress: Progress = field(default_factory=Progress)
    log: TrialLog | None = None


def run_job(options: JobOptions, space: Sequence[Candidate], grid: Grid | None = None) -> str:
    """Do a Job's work and return what happened, for people.

    Whatever the end, the run's ConfigMap says it.

    Args:
        options: What the operator gave.
        space: The strategies to begin with.
        grid: The strategy space around them; None to measure no others.

    Raises:
        SpecError: An input is wrong.
        InfeasibleError: A class has no profile but the raw one within its budget; the set was published.
        UnsupportedError: The model can't be profiled.
        KVServeError: Something else failed, and may work the next time.
    """
    inputs = read_inputs(options.inputs)
    state = State()
    with closing(RunConfigMaps(options.owner, inputs.digest)) as maps:
        try:
            result = _measure(options, inputs, space, grid, maps, state)
            message = maps.publish(result)
            if why := result.provenance["calibration"].get(UNCALIBRATED):
                message += f"; nothing calibrated was measured: {why}"
            require_feasible(inputs, result)
        except Exception as error:
            _save_last(maps, state, last_words(error))
            raise
        _save_last(maps, state, message)
        if inputs.parallelism > 1:
            maps.offer(None, Work(done=True).document())
    return message


def _measure(
    options: JobOptions,
    inputs: RunInputs,
    space: Sequence[Candidate],
    grid: Grid | None,
    maps: RunConfigMaps,
    state: State,
) -> ParetoSet:
    with Coalescer[tuple[Progress, TrialLog | None]](
        lambda value: maps.save(*value),
        interval_s=WRITE_INTERVAL_S,
        on_error=lambda error: say(f"progress not written: {last_words(error)}"),
    ) as writer:

        def report(progress: Progress, log: TrialLog) -> None:
            state.progress, state.log = progress, log
            say(f"{progress} {progress.message}".rstrip())
            writer.put((progress, log))

        total = inputs.max_trials if grid else min(inputs.max_trials, len(space))

        def tell(message: str) -> None:
            state.progress = Progress(total=total, message=message)
            say(f"{state.progress} {message}")
            writer.put((state.progress, None))

        state.progress = Progress(total=total, message="starting")
        task = options.task(inputs, space, grid)
        earlier = maps.load()
        calibration = options.calibration()
        task = calibration.make(calibration.plan(task), earlier, tell)
        log = task.log()
        try:
            log = log.resume(earlier)
        except ArtifactError as error:
            say(f"trials of an earlier pod not used: {error}")
        pods = inputs.parallelism
        return profile(task, log, report, Helpers(maps, pods, say) if pods > 1 else None)


def _save_last(maps: RunConfigMaps, state: State, message: str) -> None:
    last = state.progress
    progress = replace(last, message=message)
    try:
        maps.save(progress, state.log)
    except Exception as error:
        # the exit code and the result say the same; the run's own error must not be hidden by this one
        say(f"progress not written: {last_words(error)}")


def read_inputs(path: Path) -> RunInputs:
    """Read the inputs of a run.

    Raises:
        SpecError: They can't be read, or are wrong.
    """
    try:
        with path.open("rb") as file:
            document = file.read(MAX_INPUTS_BYTES)
    except OSError as error:
        raise SpecError("inputs", f"can't read {path}: {error.strerror}") from error
    return RunInputs.parse(document)


def say(line: str) -> None:
    """Write a line to the Job's log."""
    print(line, file=sys.stderr, flush=True)
