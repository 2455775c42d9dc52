"""Pods that measure together give the log of one, whoever is there to help."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from kvserve_api.errors import ArtifactError
from kvserve_api.progress import Progress
from kvserve_api.run import ClassInputs, TaskInputs
from kvserve_profiler import patience
from kvserve_profiler.candidates import preset_space
from kvserve_profiler.crew import Alone, Crew, Item, Work, read_results, write_results
from kvserve_profiler.engine import Run, profile
from kvserve_profiler.fronts import unanswered
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.items import TaskSet
from kvserve_profiler.trials import Phase, Trial, TrialLog
from kvserve_strategies.presets import PRESETS

MakeTask = Callable[..., Task]
PODS = 3
ITEM = Item(phase=Phase.SEARCH, name="fp8", strategy=PRESETS["fp8"])


class Twins:
    """Helpers that measure their shares as soon as these are offered."""

    pods = PODS

    def __init__(self, helper: Run, *, absent: tuple[int, ...] = ()) -> None:
        self.helper = helper
        self.task = helper.task
        self.absent = absent
        self.present = set(range(1, PODS))
        self.brought: list[Trial] = []

    def give_up(self, index: int) -> None:
        """Those who are absent have signed in all the same."""
        assert index in self.absent
        self.present.discard(index)

    def offer(self, log: TrialLog, work: Work) -> None:
        """Measure, from what goes over the wire."""
        log = self.task.log().resume("".join(log.lines()))
        work = Work.parse(work.document())
        for index in set(range(1, PODS)) - set(self.absent):
            trials = [self.helper.do(log, work.searched, item) for item in work.share(index, PODS)]
            self.brought += read_results(write_results(trials))

    def found(self) -> list[Trial]:
        """Return all of it, again and again."""
        return self.brought


def finished(task: Task, crew: Crew | None = None, text: str = "") -> tuple[TrialLog, list[str]]:
    """Return the log of a run, and what the deciding pod measured itself."""
    logs: list[TrialLog] = []
    own: list[str] = []

    def report(progress: Progress, log: TrialLog) -> None:
        logs.append(log)
        if progress.message.startswith(("measuring", "asking")):
            own.append(progress.message)

    profile(task, task.log().resume(text), report, crew)
    return logs[-1], own


def what(log: TrialLog) -> list[Any]:
    """Return what does not depend on the clock: whom a task is asked of does, by the codec times of the front."""
    return [
        (trial.phase, trial.name, trial.measurement and trial.measurement.qualities)
        for trial in log.trials
        if trial.phase != Phase.TASK
    ]


@pytest.fixture(scope="module")
def task(make_task: MakeTask) -> Task:
    """A run of three pods over the presets that need no calibration, with a task."""
    lines = [
        {"task": "multiple-choice", "question": f"{n} " * 9, "choices": ["a", "b"], "answer": 0}
        for n in range(2)
    ]
    items = TaskSet.parse("\n".join(map(json.dumps, lines)).encode(), "items")
    space = tuple(c for c in preset_space() if not c.calibrated)
    made = make_task(max_trials=9, space=space)
    wanted = TaskInputs(source="configmap", items=2, max_loss_bp=9000)
    inputs = dataclasses.replace(
        made.inputs,
        parallelism=PODS,
        classes={"default": ClassInputs(max_loss_bp=10_000, tasks={"choice": wanted})},
    )
    return dataclasses.replace(made, inputs=inputs).checked_by({"default": {"choice": items}})


@pytest.fixture(scope="module")
def alone(task: Task) -> TrialLog:
    """The log where nobody helps."""
    return finished(task)[0]


@pytest.fixture(scope="module")
def helper(task: Task) -> Run:
    """What a helper measures with."""
    return Run.of(task, lambda *_: None, Alone())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for those who are absent."""
    monkeypatch.setattr(patience, "LEAST_S", 0.0)
    monkeypatch.setattr(patience, "USUAL", 0.0)


def same_screening(task: Task, alone: TrialLog) -> str:
    """Return the log before its first trial: times of the screening differ from run to run."""
    return "".join(dataclasses.replace(alone, trials=()).lines())


@pytest.mark.parametrize("absent", [(), (2,)])
def test_helpers_change_nothing_but_who_measures(
    task: Task, alone: TrialLog, helper: Run, absent: tuple[int, ...]
) -> None:
    """With all helpers or some the same is tried in the same order as with none, with the same results."""
    log, own = finished(task, Twins(helper, absent=absent), same_screening(task, alone))
    assert what(log) == what(alone)
    assert log.of(Phase.TASK)
    assert not unanswered(task, log)
    total = len(log.of(Phase.SEARCH)) + len(log.of(Phase.TASK))
    assert total // PODS <= len(own) < total


@pytest.mark.parametrize("lines", [4, 9])
def test_a_deciding_pod_that_was_killed_goes_on(
    task: Task, alone: TrialLog, helper: Run, lines: int
) -> None:
    """Cut after any trial, also inside a batch, the log ends the same, with what helpers had brought."""
    crew = Twins(helper)
    text = "".join(alone.lines()[:lines])
    log = finished(task, crew, text)[0]
    assert what(log) == what(alone)
    assert not unanswered(task, log)


def test_batches_are_as_large_as_the_crew(task: Task, alone: TrialLog) -> None:
    """All of a batch is decided by what was known before it."""
    offered: list[Work] = []

    class Watcher(Alone):
        pods = PODS

        def offer(self, log: TrialLog, work: Work) -> None:
            offered.append(work)

    finished(task, Watcher(), same_screening(task, alone))
    searches = [w for w in offered if w.items and w.items[0].phase == Phase.SEARCH]
    assert [len(work.items) for work in searches] == [2, 3, 3, 1]
    assert [work.searched for work in searches] == [0, 2, 5, 8]


def test_work_goes_over_the_wire() -> None:
    """What is offered is read back, shares are disjoint and whole, and nothing is nothing."""
    items = tuple(dataclasses.replace(ITEM, name=f"n{n}") for n in range(7))
    work = Work(searched=4, items=items)
    assert Work.parse(work.document()) == work
    assert Work.parse("") == Work()
    shares = [work.share(index, 3) for index in range(3)]
    assert sorted(item.name for share in shares for item in share) == [i.name for i in items]
    assert read_results("") == []


@pytest.mark.parametrize("document", ["{", "[]", '{"schema":"x"}', '{"items":3}'])
def test_damaged_work_is_refused(document: str) -> None:
    """What nobody wrote is a typed error."""
    with pytest.raises(ArtifactError):
        Work.parse(document)
