"""What a run does next, on a log of made-up losses."""

import dataclasses
import hashlib
from collections.abc import Callable

import pytest

from kvserve_api.latency import StageCost
from kvserve_api.wire import KVLayout
from kvserve_profiler.candidates import Candidate, gather, grid, preset_space
from kvserve_profiler.plan import Plan, search_is_over, survivors, unconfirmed
from kvserve_profiler.quality import Quality
from kvserve_profiler.screening import Cheap, Screening
from kvserve_profiler.task import Task
from kvserve_profiler.trials import Measurement, Phase, Trial, TrialLog

MakeTask = Callable[..., Task]
LAYOUT = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16")
TRIALS = 14


def chance(candidate: Candidate, what: str) -> float:
    """Return a number from 0 to 1 that belongs to a candidate."""
    word = hashlib.sha256((what + candidate.strategy.digest).encode()).digest()
    return int.from_bytes(word[:4]) / 2**32


@pytest.fixture(scope="module")
def task(make_task: MakeTask) -> Task:
    """A run that may search the whole space without a calibration."""
    return dataclasses.replace(
        make_task(max_trials=TRIALS, space=preset_space()).without_bundle("there is none"),
        grid=grid,
    )


@pytest.fixture(scope="module")
def candidates(task: Task) -> tuple[Candidate, ...]:
    """Those of the run."""
    return gather(task.space, grid(LAYOUT, None), max_trials=TRIALS, seed=0)


@pytest.fixture(scope="module")
def screened(task: Task, candidates: tuple[Candidate, ...]) -> TrialLog:
    """A log before the first trial."""
    found = {
        c.strategy.digest.removeprefix("sha256:")[:16]: Cheap(
            ratio=1 + 6 * chance(c, "ratio"), codec_s=0.01 + 0.1 * chance(c, "time")
        )
        for c in candidates
    }
    return task.log().screened(Screening(found))


def tried(task: Task, log: TrialLog, candidate: Candidate) -> Trial:
    """Return a trial that loses about as the ratio says; one of three fails."""
    if candidate.name not in ("none", "lossless") and chance(candidate, "fails") < 1 / 3:
        return Trial(
            name=candidate.name, strategy=candidate.strategy, duration_s=1, error="it gave NaN"
        )
    assert log.screening is not None
    cheap = log.screening.of(candidate.strategy)
    assert cheap is not None
    loss = 2.0 ** (1.3 * cheap.ratio + chance(candidate, "loss"))
    quality = Quality(
        ratio=cheap.ratio, kl=loss / 1e4, loss_bp=loss, loss_upper_bp=1.3 * loss, agreement=0.9,
        tokens=256, windows_bp=(loss, 1.1 * loss),
    )  # fmt: skip
    (text,) = task.budgets_bp
    measurement = Measurement(qualities={text: quality}, lossless=False, native_bytes=10**6)
    return Trial(
        name=candidate.name, strategy=candidate.strategy, duration_s=1, measurement=measurement
    )


def go_on(task: Task, candidates: tuple[Candidate, ...], log: TrialLog) -> TrialLog:
    """Search to the end."""
    plan = Plan.of(task, candidates, log)
    while batch := plan.next(log):
        for candidate in batch:
            log = log.plus(tried(task, log, candidate))
    return log


@pytest.fixture(scope="module")
def whole(task: Task, candidates: tuple[Candidate, ...], screened: TrialLog) -> TrialLog:
    """The log of a search that nobody killed."""
    return go_on(task, candidates, screened)


def test_a_search_keeps_its_budget(task: Task, whole: TrialLog) -> None:
    """As many trials as allowed, all different, the raw and the lossless profile first, points of the space later."""
    names = [trial.name for trial in whole.trials]
    assert names[:2] == ["none", "lossless"]
    assert len(set(names)) == TRIALS
    assert set(names) - {candidate.name for candidate in task.space}
    assert search_is_over(task, whole)
    assert not search_is_over(task, task.log())


@pytest.mark.parametrize("kept", [1, 9, 11, 12])
def test_a_killed_search_goes_on_alike(
    task: Task, candidates: tuple[Candidate, ...], whole: TrialLog, kept: int
) -> None:
    """Killed after any trial, also inside a batch, it suggests what it would have suggested."""
    text = "".join(whole.lines()[: 2 + kept])
    log = task.log().resume(text)
    assert not search_is_over(task, log)
    assert go_on(task, candidates, log) == whole


def test_failed_trials_are_kept_and_count(task: Task, whole: TrialLog) -> None:
    """They use up the budget, are never repeated, and survive nothing."""
    failed = {trial.name for trial in whole.trials if trial.measurement is None}
    assert failed
    assert not failed & {trial.name for trial in survivors(task, whole)}


def test_survivors_are_what_may_enter_the_set(task: Task, whole: TrialLog) -> None:
    """What every set has, what no other beats within four budgets, and the least lossy; each until it was confirmed."""
    kept = survivors(task, whole)
    names = {trial.name for trial in kept}
    assert {"none", "lossless"} <= names
    (text,) = task.budgets_bp
    losses = {t.name: t.measurement.qualities[text].loss_bp for t in kept if t.measurement}
    lossy = {name: loss for name, loss in losses.items() if name not in ("none", "lossless")}
    assert max(lossy.values()) <= 4 * task.budgets_bp[text]
    assert unconfirmed(task, whole) == kept
    cost = StageCost(bytes_per_s=1e9)
    first = kept[0]
    assert first.measurement is not None
    done = dataclasses.replace(
        first,
        phase=Phase.CONFIRM,
        measurement=dataclasses.replace(first.measurement, encode=cost, decode=cost),
    )
    assert unconfirmed(task, whole.plus(done)) == kept[1:]


def test_the_least_lossy_survives_a_budget_of_nothing(task: Task, whole: TrialLog) -> None:
    """So that a run can say how much the least is."""
    inputs = dataclasses.replace(
        task.inputs,
        classes={n: dataclasses.replace(c, max_loss_bp=0) for n, c in task.inputs.classes.items()},
    )
    strict = dataclasses.replace(task, inputs=inputs)
    names = {trial.name for trial in survivors(strict, whole)}
    assert len(names - {"none", "lossless"}) >= 1


def test_budgets_allow_for_the_margin_of_the_upper_limit(
    task: Task, candidates: tuple[Candidate, ...], whole: TrialLog
) -> None:
    """The search aims at losses whose upper limit is the budget."""
    plan = Plan.of(task, candidates, whole)
    assert plan.budgets_bp(whole.trials) == pytest.approx([100 / 1.3])
