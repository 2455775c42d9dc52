"""How a run gets its calibration bundle, and what it does without one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvserve_api.profile_set import ParetoSet
from kvserve_profiler.calibration import Calibration
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.engine import profile
from kvserve_profiler.model import Model
from kvserve_profiler.outcome import pareto_set
from kvserve_profiler.task import Task
from kvserve_profiler.trials import TrialLog, basis_of
from kvserve_strategies.artifacts import Store, open_store
from kvserve_strategies.bundle import Bundle
from random_bundles import joint_strategy, write_sample

MakeTask = Callable[..., Task]
JOINT = Candidate(name="joint", strategy=joint_strategy(layers=2))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fetched bundles apart from those of other tests."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def task(make_task: MakeTask, space: tuple[Candidate, ...]) -> Task:
    """A task with a calibrated strategy among others."""
    return make_task(space=(*space[:1], JOINT, *space[2:3]))


@pytest.fixture
def bundle(task: Task, store: Store, tmp_path: Path) -> Bundle:
    """A bundle of the tiny model, in the store; of random bases, so that it says nothing of quality."""
    layout = Model(task.source).layout
    made = write_sample(tmp_path / "bundle", layout, task.identity.fingerprint, layers=2)
    store.put_bundle(tmp_path / "bundle")
    return made


def run(task: Task) -> tuple[ParetoSet, TrialLog]:
    """Do a run and return its result and its log."""
    logs = [task.log()]
    result = profile(task, task.log(), lambda _, log: logs.append(log))
    return result, logs[-1]


def best(log: TrialLog, name: str) -> TrialLog:
    """Return the log with one trial such that no other beats it."""
    trials = []
    for trial in log.trials:
        if trial.name == name and trial.measurement is not None:
            qualities = {
                text: replace(quality, ratio=99.0)
                for text, quality in trial.measurement.qualities.items()
            }
            trial = replace(trial, measurement=replace(trial.measurement, qualities=qualities))
        trials.append(trial)
    return replace(log, trials=tuple(trials))


@pytest.mark.parametrize(
    ("tokens", "has_store", "why"),
    [
        pytest.param(None, False, "KVSERVE_ARTIFACTS is empty", id="no-store"),
        pytest.param(0, True, "KVSERVE_CALIBRATION_TOKENS is 0", id="no-tokens"),
    ],
)
def test_without_calibration_only_others_are_measured(
    task: Task, store: Store, tokens: int | None, has_store: bool, why: str
) -> None:
    """Strategies that need a bundle are left out, and the set says why."""
    calibration = Calibration(store=store if has_store else None, tokens=tokens)
    planned = calibration.make(calibration.plan(task), "", pytest.fail)
    result, log = run(planned)
    assert {trial.name for trial in log.trials} == {"none", "int8-token"}
    assert why in result.provenance["calibration"]["none"]
    assert {p.bundle for p in result.profiles("default")} == {None}
    assert "bundle" not in log.basis


def test_profiles_name_their_bundle(task: Task, bundle: Bundle) -> None:
    """A calibrated profile carries the digest of its bundle, others none; the log names what its trials used."""
    calibrated = task.with_bundle(bundle)
    result, log = run(calibrated)
    assert {t.name for t in log.trials if t.measurement} == {"none", "joint", "int8-token"}
    found = {
        p.name: p.bundle for p in pareto_set(calibrated, best(log, "joint")).profiles("default")
    }
    assert found["joint"] == bundle.digest
    assert {found[name] for name in set(found) - {"joint"}} == {None}
    assert log.basis["bundle"] == bundle.digest
    assert result.provenance["calibration"]["bundle"] == bundle.digest
    assert result.provenance["calibration"]["made"] == "at random"
    assert ParetoSet.parse(result.canonical()) == result


def test_a_run_that_was_killed_finds_its_bundle(
    make_task: MakeTask, space: tuple[Candidate, ...], store: Store, tmp_path: Path
) -> None:
    """What the same run calibrated before is fetched by the digest in its log; else it is made, always the same."""
    joint = Candidate(name="joint", strategy=joint_strategy(layers=2, space="query"))
    calibration = Calibration(store=store, tokens=2048)
    planned = calibration.plan(make_task(space=(*space[:1], joint)))
    told: list[str] = []
    first = calibration.make(planned, "", told.append)
    assert first.bundle is not None
    assert told[0] == "calibrating"
    assert all(message.startswith("calibrating") for message in told)
    earlier = "".join(first.log().lines())
    found = calibration.make(planned, earlier, pytest.fail).bundle
    assert found is not None
    assert found.digest == first.bundle.digest
    # with other settings it is not what would be made
    other = Calibration(store=store, tokens=4096)
    told.clear()
    another = other.make(other.plan(planned), earlier, told.append).bundle
    assert another is not None
    assert another.digest != found.digest
    assert told
    # gone from the store, and from this machine
    shutil.rmtree(tmp_path / "store" / found.digest.removeprefix("sha256:"))
    shutil.rmtree(tmp_path / "cache")
    told.clear()
    again = calibration.make(planned, earlier, told.append).bundle
    assert again is not None
    assert again.digest == found.digest
    assert told


def test_a_log_that_is_none_has_no_basis() -> None:
    """An empty or broken text tells nothing about an earlier bundle."""
    assert basis_of("") == {}
    assert basis_of("{") == {}
    assert basis_of('{"basis": 3}\n') == {}
