"""Which profiles answer which tasks, on a log of made-up measurements and answers."""

import dataclasses
from collections.abc import Callable

import pytest

from kvserve_api.latency import StageCost
from kvserve_api.quality import TaskScore
from kvserve_api.run import ClassInputs, TaskInputs
from kvserve_profiler.fronts import best, unanswered
from kvserve_profiler.quality import Quality
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.builtin import task_set
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog
from kvserve_strategies.presets import PRESETS

MakeTask = Callable[..., Task]
FACTS = task_set("retrieval", items=3)
LIMIT_BP = 6000
CONFIRMED = {
    # name: ratio, loss in basis points; kivi-4 is beaten by centred-rans in both
    "none": (1.0, 0.0),
    "fp8": (1.9, 12.0),
    "kivi-4": (3.5, 50.0),
    "int4-token": (3.4, 60.0),
    "centred-rans": (5.9, 40.0),
}


@pytest.fixture
def task(make_task: MakeTask) -> Task:
    """A run whose class must answer facts."""
    made = make_task()
    asked = TaskInputs(source="built-in:retrieval", items=3, max_loss_bp=LIMIT_BP)
    classes = {"default": ClassInputs(max_loss_bp=100, tasks={"facts": asked})}
    inputs = dataclasses.replace(made.inputs, classes=classes)
    return dataclasses.replace(made, inputs=inputs).checked_by({"default": {"facts": FACTS}})


@pytest.fixture
def confirmed(task: Task) -> TrialLog:
    """The log when the last profile was confirmed."""
    cost = StageCost(bytes_per_s=1e9)
    log = task.log()
    for name, (ratio, loss_bp) in CONFIRMED.items():
        quality = Quality(
            ratio=ratio, kl=loss_bp / 1e4, loss_bp=loss_bp, loss_upper_bp=loss_bp, agreement=1.0,
            tokens=1,
        )  # fmt: skip
        measurement = Measurement(
            qualities={task.texts["default"].digest: quality},
            encode=cost,
            decode=cost,
            lossless=name == "none",
            native_bytes=1000,
        )
        trial = Trial(
            name=name,
            strategy=PRESETS[name],
            phase=Phase.CONFIRM,
            duration_s=1,
            measurement=measurement,
        )
        log = log.plus(trial)
    return log


def answered(log: TrialLog, name: str, upper_bp: float | None) -> TrialLog:
    """Return the log after a profile has answered, or could not."""
    score = None
    if upper_bp is not None:
        score = TaskScore(items=3, exact=1.0, compressed=0.5, loss_upper_bp=upper_bp)
    return log.plus(
        Trial(
            name=name, strategy=PRESETS[name], phase=Phase.TASK, duration_s=1, task=FACTS.key,
            score=score, error="" if score else "it gave NaN",
        )
    )  # fmt: skip


def names(task: Task, log: TrialLog) -> list[str]:
    """Return who is to answer next."""
    return [question.profile.name for question in unanswered(task, log)]


def test_only_what_no_other_beats_answers(task: Task, confirmed: TrialLog) -> None:
    """Beaten profiles and lossless ones are spared; when all have kept the budget there is nothing more to ask."""
    assert names(task, confirmed) == ["centred-rans", "fp8"]
    log = answered(answered(confirmed, "centred-rans", LIMIT_BP), "fp8", 5000.0)
    assert names(task, log) == []
    assert [p.name for p in best(task, log, "default")] == ["centred-rans", "fp8", "none"]
    assert best(task, log, "default")[0].tasks["facts"].loss_upper_bp == LIMIT_BP


@pytest.mark.parametrize("upper_bp", [pytest.param(LIMIT_BP + 1.0, id="lost"), None])
def test_who_fails_is_replaced_by_the_next(
    task: Task, confirmed: TrialLog, upper_bp: float | None
) -> None:
    """Where the best fails a task, those that it beat are asked, one after the other, and join it in the set."""
    log = answered(answered(confirmed, "centred-rans", upper_bp), "fp8", 5000.0)
    assert names(task, log) == ["kivi-4"]
    failed = answered(log, "kivi-4", 9000.0)
    assert names(task, failed) == ["int4-token"]
    last = answered(failed, "int4-token", 9000.0)
    assert names(task, last) == []
    assert [p.name for p in best(task, last, "default")] == ["centred-rans", "fp8", "none"]
    kept = answered(log, "kivi-4", 100.0)
    assert names(task, kept) == []
    assert [p.name for p in best(task, kept, "default")] == [
        "centred-rans", "kivi-4", "fp8", "none",
    ]  # fmt: skip


def test_other_items_are_asked_again(task: Task, confirmed: TrialLog) -> None:
    """Answers to items that were edited, or to fewer of them, do not count."""
    log = answered(answered(confirmed, "centred-rans", 1.0), "fp8", 1.0)
    more = task.checked_by({"default": {"facts": task_set("retrieval", items=4)}})
    assert names(more, log) == ["centred-rans", "fp8"]
