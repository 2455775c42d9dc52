"""A whole run on a tiny model: what is measured, what a failure does, and how a killed run goes on."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvserve_api.errors import InfeasibleError, SpecError, StrategyError, UnsupportedError
from kvserve_api.profile_set import NONE, ParetoSet
from kvserve_api.progress import Progress
from kvserve_api.run import ClassInputs, RunInputs, TaskInputs
from kvserve_api.space_limits import Allow, SpaceLimits, StrategySelector
from kvserve_api.strategy import Kind, Part, StageConfig, StrategyConfig
from kvserve_profiler.bench import Bench
from kvserve_profiler.candidates import Candidate, grid, preset_space
from kvserve_profiler.codec import Codec
from kvserve_profiler.engine import profile
from kvserve_profiler.model import KV, Model
from kvserve_profiler.narrowing import family_of
from kvserve_profiler.outcome import pareto_set, require_feasible
from kvserve_profiler.plan import search_is_over
from kvserve_profiler.quality import MeasurementError
from kvserve_profiler.settings import Settings
from kvserve_profiler.task import Task
from kvserve_profiler.tasks.items import TaskSet
from kvserve_profiler.texts import Text, unique
from kvserve_profiler.trials import Phase, TrialLog

MakeTask = Callable[..., Task]


def broken_candidate(name: str) -> Candidate:
    """Return a strategy of a stage that does not exist."""
    chain = (StageConfig(id="code.missing.v1"),)
    return Candidate(
        name=name,
        strategy=StrategyConfig(parts=tuple(Part(kind=kind, chain=chain) for kind in Kind)),
    )


def run(task: Task, log: TrialLog | None = None) -> tuple[ParetoSet, TrialLog, list[Progress]]:
    """Do a run and return its result, its log and its progress."""
    logs: list[TrialLog] = []
    steps: list[Progress] = []

    def report(progress: Progress, log: TrialLog) -> None:
        steps.append(progress)
        logs.append(log)

    result = profile(task, log or task.log(), report)
    return result, logs[-1] if logs else log or task.log(), steps


def qualities(log: TrialLog) -> list[Any]:
    """Return what does not depend on the clock."""
    return sorted(
        (t.name, t.phase, str(t.measurement.qualities) if t.measurement else t.error)
        for t in log.trials
    )


def test_a_run_measures_what_is_known_of_the_presets(make_task: MakeTask) -> None:
    """Ratios follow from the formats, losses are ordered by bits, and the raw profile loses nothing."""
    result, _, steps = run(make_task())
    by_name = {p.name: p for p in result.profiles("default")}
    none, int8, int4 = by_name[NONE], by_name["int8-token"], by_name["int4-token"]
    # a prefix has 6,144 bytes, so the header shows; a head of 8 has 8 or 4 bytes of levels and 4 of bounds
    assert 0.9 < none.ratio < 1.0
    assert 1.15 < int8.ratio < 16 / 12
    assert 1.6 < int4.ratio < 16 / 8
    assert none.loss_bp == none.loss_upper_bp == 0.0
    assert none.lossless
    assert 0 < int8.loss_bp < int4.loss_bp
    assert int4.loss_bp <= int4.loss_upper_bp
    assert not int4.lossless
    assert [p.ratio for p in result.profiles("default")] == sorted(
        (p.ratio for p in by_name.values()), reverse=True
    )
    assert steps[-1] == Progress(completed=4, failed=0, total=4)
    assert ParetoSet.parse(result.canonical()) == result


def test_a_run_forecasts_what_strategies_lose(make_task: MakeTask, settings: Settings) -> None:
    """Before its first trial it knows that less bits lose more; without gradients it forecasts nothing."""
    task = make_task(max_trials=1)
    _, log, _ = run(task)
    assert log.screening is not None
    found = {one.name: log.screening.of(one.strategy) for one in task.space}
    forecasts = {name: cheap.forecast_bp for name, cheap in found.items() if cheap is not None}
    assert forecasts[NONE] == ((0.0, 0.0),)
    assert {len(pairs) for pairs in forecasts.values()} == {1}
    for kind in range(2):
        assert 0 < forecasts["int8-token"][0][kind] < forecasts["int4-token"][0][kind]
    _, bare, _ = run(make_task(max_trials=1, settings=dataclasses.replace(settings, gradients=0)))
    assert bare.screening is not None
    assert {cheap.forecast_bp for cheap in bare.screening.found.values() if cheap} == {()}


def test_the_same_seed_gives_the_same_qualities(make_task: MakeTask) -> None:
    """Two runs differ in nothing but times."""
    _, first, _ = run(make_task())
    _, second, _ = run(make_task())
    assert qualities(first) == qualities(second)


@pytest.fixture(scope="module")
def whole(make_task: MakeTask) -> TrialLog:
    """The log of a run that nobody killed."""
    return run(make_task())[1]


@pytest.mark.parametrize("lines", range(1, 11))
def test_a_run_killed_after_any_line_goes_on(
    make_task: MakeTask, whole: TrialLog, lines: int
) -> None:
    """What is in the log is never done again, and the rest is done as if there had been no kill."""
    task = make_task()
    assert len(whole.lines()) == 10  # the basis, the screening, four trials, four confirmations
    text = "".join(whole.lines()[:lines])
    result, log, steps = run(task, task.log().resume(text))
    if lines == 10:
        assert steps == []
    if lines > 1:
        assert log.lines()[:lines] == whole.lines()[:lines]
        assert [(t.name, t.phase) for t in log.trials] == [(t.name, t.phase) for t in whole.trials]
    assert qualities(log) == qualities(whole)
    assert result == pareto_set(task, log)


def test_a_failed_trial_does_not_end_the_run(
    make_task: MakeTask, space: tuple[Candidate, ...]
) -> None:
    """It is counted, kept in the provenance with its reason, and not tried again."""
    task = make_task(space=(*space[:2], broken_candidate("odd"), *space[2:]))
    result, log, steps = run(task)
    assert steps[-1] == Progress(completed=4, failed=1, total=5)
    assert {p.name for p in result.profiles("default")} == {c.name for c in space}
    assert "code.missing.v1" in result.provenance["trials"]["failed"]["odd"]
    assert [t.name for t in log.trials].count("odd") == 1
    assert search_is_over(task, log)


def test_without_the_raw_profile_there_is_no_set(make_task: MakeTask) -> None:
    """When `none` can't be measured the run fails and says why."""
    with pytest.raises(MeasurementError, match=r"'none'.*code.missing.v1"):
        run(make_task(space=(broken_candidate(NONE),)))


def test_the_budget_of_trials_is_kept(make_task: MakeTask) -> None:
    """No more strategies are measured than allowed, the raw one first."""
    result, log, steps = run(make_task(max_trials=2))
    (first, second) = log.of(Phase.SEARCH)
    assert first.name == "none"
    assert steps[-1].total == 2
    assert {p.name for p in result.profiles("default")} == {"none", second.name}


def test_classes_with_their_own_text_have_their_own_losses(make_task: MakeTask) -> None:
    """Each class's profiles were measured on its text; a class without one shares the default's."""
    task = make_task()
    words = Text(digest="sha256:" + "0" * 64, documents=("one two three four " * 30,))
    inputs = dataclasses.replace(
        task.inputs,
        classes={n: ClassInputs(max_loss_bp=50) for n in ("default", "code", "words")},
    )
    task = dataclasses.replace(
        task,
        inputs=inputs,
        texts={"default": Text.builtin(), "code": Text.builtin(), "words": words},
    )
    result, _, _ = run(task)
    assert result.classes["default"] == result.classes["code"]
    loss = {
        name: {p.name: p.loss_bp for p in result.profiles(name)} for name in ("default", "words")
    }
    assert loss["default"]["int8-token"] != loss["words"]["int8-token"]


@pytest.fixture
def asked(make_task: MakeTask) -> Task:
    """A run whose profiles must choose rightly, with little to lose."""
    lines = [
        {
            "task": "multiple-choice",
            "question": f"{n} " * 20,
            "choices": ["a", "bc"],
            "answer": n % 2,
        }
        for n in range(4)
    ]
    items = TaskSet.parse("\n".join(map(json.dumps, lines)).encode(), "items")
    task = make_task()
    wanted = TaskInputs(source="configmap", items=64, max_loss_bp=4100)
    classes = {"default": ClassInputs(max_loss_bp=10_000, tasks={"choice": wanted})}
    inputs = dataclasses.replace(task.inputs, classes=classes)
    return dataclasses.replace(task, inputs=inputs).checked_by({"default": {"choice": items}})


def test_survivors_answer_the_tasks(asked: Task) -> None:
    """Each lossy profile of the set has a score, the exact share is told, and a killed run asks only the rest."""
    result, log, steps = run(asked)
    lossy = [p for p in result.profiles("default") if not p.lossless]
    assert lossy
    assert {p.name for p in lossy if p.tasks["choice"].items != 4} == set()
    assert all(p.tasks == {} for p in result.profiles("default") if p.lossless)
    (told,) = {t.score.exact for t in log.of(Phase.TASK) if t.score}
    assert result.provenance["tasks"]["default"]["choice"]["exact"] == told
    assert result.provenance["windows"] == {"default": "held out"}
    assert any(step.message.startswith("asking choice of ") for step in steps)
    assert steps[-1] == Progress(completed=4, failed=0, total=4)
    assert ParetoSet.parse(result.canonical()) == result
    text = "".join(log.lines()[:-1])
    again, rest, steps = run(asked, asked.log().resume(text))
    assert [step.message.partition(" ")[0] for step in steps if step.message] == [
        "loading",
        "asking",
    ]
    assert again.classes == result.classes
    assert len(rest.trials) == len(log.trials)


def test_a_prompt_that_is_too_long_is_bad_input(asked: Task) -> None:
    """It ends the run with the prompt's beginning, as no strategy can help."""
    line = json.dumps({"task": "last-word", "text": "word " * 400})
    items = TaskSet.parse(line.encode(), "items")
    with pytest.raises(SpecError, match="the model takes 1024"):
        run(asked.checked_by({"default": {"choice": items}}))


def test_a_text_that_is_too_short_for_held_out_windows_is_told(make_task: MakeTask) -> None:
    """Where the search's windows serve twice, the set says so."""
    text = Text(digest="sha256:" + "2" * 64, documents=("one two three four " * 4,))
    result, _, _ = run(dataclasses.replace(make_task(), texts={"default": text}))
    assert "too short for others" in result.provenance["windows"]["default"]


def test_a_policy_cuts_the_space(make_task: MakeTask) -> None:
    """Only what the limits leave is screened and tried, progress counts it, and the set says what was left out."""
    task = make_task(max_trials=12)
    limits = SpaceLimits(
        allow=Allow.UNCALIBRATED,
        include=StrategySelector(families=("fp8",), names=("int8-token",)),
        exclude=StrategySelector(stages=("code.pack.v1",)),
    )
    inputs = dataclasses.replace(task.inputs, space=limits)
    narrow = Task.of(inputs, task.source, task.texts, preset_space(), task.settings, grid)
    result, log, steps = run(narrow)
    assert {family_of(trial.name) for trial in log.of(Phase.SEARCH)} <= {"raw", "fp8"}
    assert steps[-1].total == len(log.of(Phase.SEARCH)) < 12
    assert steps[-1].allowed == steps[-1].total - 1
    assert (steps[-1].known or 0) > 300
    assert result.provenance["space"] == limits.to_json()
    nothing = SpaceLimits(include=StrategySelector(names=("joint-3x0-step9",)))
    inputs = dataclasses.replace(task.inputs, space=nothing)
    empty = Task.of(inputs, task.source, task.texts, preset_space(), task.settings, grid)
    with pytest.raises(SpecError, match="leaves no strategy but none"):
        run(empty)


def test_too_long_windows_are_unsupported(make_task: MakeTask) -> None:
    """A model with a short context is refused with both numbers."""
    task = make_task()
    settings = dataclasses.replace(task.settings, prefix_tokens=1020)
    with pytest.raises(UnsupportedError, match="takes 1024 tokens; measuring needs 1036"):
        run(dataclasses.replace(task, settings=settings))


def test_too_short_a_text_is_bad_input(make_task: MakeTask) -> None:
    """A text without a window ends the run before anything is measured."""
    task = make_task()
    short = Text(digest="sha256:" + "1" * 64, documents=("short",))
    with pytest.raises(SpecError, match="give a longer text"):
        run(dataclasses.replace(task, texts={"default": short}))


def test_feasibility_names_the_class_and_the_least_loss(make_task: MakeTask) -> None:
    """A budget below every lossy profile is infeasible; a large one is not."""
    task = make_task(budget_bp=0)
    result, _, _ = run(task)
    with pytest.raises(InfeasibleError, match=r"class default: budget 0.*int8-token, may lose"):
        require_feasible(task.inputs, result)
    generous = dataclasses.replace(
        task.inputs, classes={"default": ClassInputs(max_loss_bp=10_000)}
    )
    require_feasible(generous, result)


def test_a_codec_that_only_claims_to_be_lossless_fails(make_task: MakeTask) -> None:
    """Bits are compared, so that even a lost sign of zero is found."""
    task = make_task()
    bench = Bench(Model(task.source), unique(task.texts), task.settings)

    class Liar:
        """Returns zeros without their sign."""

        lossless = True

        def encode(self, kv: KV) -> bytes:
            self._kv = kv
            return b"x"

        def decode(self, blob: bytes, tokens: int) -> KV:
            return KV(keys=self._kv.keys + 0.0, values=torch.zeros_like(self._kv.values))

    with pytest.raises(MeasurementError, match="says it is lossless"):
        bench.measure(Liar())  # type: ignore[arg-type]


def test_a_strategy_that_can_not_work_is_refused(make_task: MakeTask) -> None:
    """The codec of an unknown stage does not come to be."""
    with pytest.raises(StrategyError):
        Codec.of(
            broken_candidate("x").strategy,
            fingerprint="sha256:" + "0" * 64,
            layout=None,  # type: ignore[arg-type]
        )


def test_the_presets_begin_with_the_raw_one() -> None:
    """Whatever the budget of trials, the raw profile is measured."""
    presets = preset_space()
    assert presets[0].name == NONE
    assert len({c.strategy.digest for c in presets}) == len(presets) >= 6


def test_inputs_decide_the_digest_of_a_run() -> None:
    """Budgets are not part of it, the seed is."""
    inputs = RunInputs(
        policy="a/b",
        model="m",
        revision="",
        model_source="",
        classes={"default": ClassInputs(max_loss_bp=1)},
        max_trials=4,
    )
    other = dataclasses.replace(inputs, classes={"default": ClassInputs(max_loss_bp=2)})
    assert other.digest == inputs.digest
    assert dataclasses.replace(inputs, seed=1).digest != inputs.digest
