"""A pod that measures what index 0 of its Job hands out."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from kvserve_api.errors import ArtifactError
from kvserve_api.names import RUN_TRIALS_KEY, RUN_WORK_KEY
from kvserve_profiler.candidates import Candidate, Grid
from kvserve_profiler.configmaps import RunConfigMaps
from kvserve_profiler.crew import Alone, Work, write_results
from kvserve_profiler.engine import Run
from kvserve_profiler.helpers import results_key
from kvserve_profiler.job import JobOptions, read_inputs, say
from kvserve_profiler.task import BUNDLE_KEY, Task
from kvserve_profiler.trials import Trial, TrialLog, basis_of

LOOK_S: Final = 1.0
"""Between two looks at what is handed out."""


def help_out(
    options: JobOptions,
    index: int,
    space: Sequence[Candidate],
    grid: Grid | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Measure until there is no more, and return what happened, for people.

    Args:
        options: What the operator gave.
        index: Of this pod, from 1.
        space: See `run_job`.
        grid: See `run_job`.
        sleep: How to wait.

    Raises:
        SpecError: An input is wrong.
        UnsupportedError: The model can't be profiled.
        UnavailableError: The API server, the hub or the store does not answer.
    """
    inputs = read_inputs(options.inputs)
    with closing(RunConfigMaps(options.owner, inputs.digest)) as maps:
        task = options.task(inputs, space, grid)
        helper: Run | None = None
        mine: list[Trial] = []
        count = 0
        while True:
            data = maps.read()
            work = Work.parse(data.get(RUN_WORK_KEY, ""))
            if work.done:
                return f"pod {index} measured {count} trials for the others"
            todo = [
                item
                for item in work.share(index, inputs.parallelism)
                if not any(item.is_of(trial) for trial in mine)
            ]
            if not todo:
                sleep(LOOK_S)
                continue
            text = data.get(RUN_TRIALS_KEY, "")
            if helper is None:
                task = _calibrated(options, task, text)
                helper = Run.of(task, lambda progress, _: say(progress.message), Alone())
                # whoever has signed in is waited for
                maps.write({results_key(index): write_results(mine)})
                continue
            try:
                log = _whole(task.log().resume(text), work)
            except ArtifactError as error:
                # another kind of processor, say: what it measures is not what index 0 measures
                return f"pod {index} can't help: {error}"
            trial = helper.do(log, work.searched, todo[0])
            count += 1
            # what is not asked for any more is in the log of index 0
            mine = [one for one in mine if any(item.is_of(one) for item in work.items)] + [trial]
            maps.write({results_key(index): write_results(mine)})


def _calibrated(options: JobOptions, task: Task, text: str) -> Task:
    """Return the task with the bundle that index 0 has made, if it has one."""
    calibration = options.calibration()
    planned = calibration.plan(task)
    if BUNDLE_KEY not in basis_of(text):
        return planned.without_bundle("index 0 has none")
    return calibration.make(planned, text, say)


def _whole(log: TrialLog, work: Work) -> TrialLog:
    """Return the log if it has all that was known when the work was decided.

    Raises:
        ArtifactError: It was too long for a ConfigMap.
    """
    if log.screening is None or len(log.trials) < work.searched:
        raise ArtifactError("trials.jsonl", "is longer than a ConfigMap holds")
    return log
