"""`kvserve profile`: options, files, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner, Result

from caches import own_cache
from kvserve_api.errors import PolicyError, SpecError
from kvserve_api.profile_set import ParetoSet
from kvserve_profiler.cli import local_inputs, profile, read_policy, text_files
from kvserve_strategies.artifacts import open_store

POLICY = """
apiVersion: v1
kind: ConfigMap
metadata: {name: beside}
---
apiVersion: kvserve.io/v1alpha1
kind: KVServePolicy
metadata: {name: chat}
spec:
  model: {name: test/tiny}
  targets:
  - {role: Prefill, selector: {matchLabels: {app: p}}}
  - {role: Decode, selector: {matchLabels: {app: d}}}
  quality: {maxLossBasisPoints: 10000}
  profiling: {budget: {maxTrials: 4}}
  workloads:
  - name: code
    quality: {maxLossBasisPoints: 9000}
    evaluation: {configMapRef: {name: texts, key: code}}
"""


@pytest.fixture(autouse=True)
def no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what would calibrate, and keep fetched bundles apart."""
    monkeypatch.setenv("KVSERVE_CALIBRATION_TOKENS", "0")
    monkeypatch.setenv("KVSERVE_CACHE_DIR", own_cache(tmp_path / "cache"))


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    """A policy with a class that has its own text."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def invoke(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(profile, [str(argument) for argument in arguments])


def test_a_run_writes_the_set_and_the_log(
    model_folder: Path, policy_file: Path, tmp_path: Path
) -> None:
    """The policy's classes and budget count, the table is printed, and the files hold what it shows."""
    (tmp_path / "code.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    arguments = ("--model", model_folder, "--policy", policy_file, "--out", tmp_path / "out")
    done = invoke(*arguments, "--text", f"code={tmp_path / 'code.txt'}")
    assert done.exit_code == 0, done.output
    result = ParetoSet.parse((tmp_path / "out" / "pareto.json").read_bytes())
    assert result.model.name == "test/tiny"
    assert set(result.classes) == {"default", "code"}
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines[2:]]
    searched = [trial["name"] for trial in trials if trial["phase"] == "search"]
    assert searched[:2] == ["none", "lossless"]
    assert len(searched) == 4
    confirmed = {trial["name"] for trial in trials if trial["phase"] == "confirm"}
    assert {p.name for profiles in result.classes.values() for p in profiles} <= confirmed
    assert result.digest in done.stdout
    assert "class code" in done.stdout
    assert f"3/4 measuring {searched[3]}" in done.stderr
    assert "4/4 confirming none" in done.stderr
    # again: nothing left to measure, the same result
    again = invoke(*arguments, "--text", f"code={tmp_path / 'code.txt'}")
    assert again.exit_code == 0
    assert "measuring" not in again.stderr
    assert ParetoSet.parse((tmp_path / "out" / "pareto.json").read_bytes()) == result


def test_a_calibrated_run_leaves_its_bundle(model_folder: Path, tmp_path: Path) -> None:
    """The bundle is in DIR/bundles and in the store that was named; a second run finds it there."""
    out, store = tmp_path / "out", tmp_path / "store"
    arguments = (
        "--model", model_folder, "--out", out, "--artifacts", store.as_uri(),
        "--calibration-tokens", 2048, "--max-trials",
    )  # fmt: skip
    done = invoke(*arguments, 2)
    assert done.exit_code in (0, 65), done.output
    assert "calibrating" in done.stderr
    basis, _, trial, *_ = map(json.loads, (out / "trials.jsonl").read_text().splitlines())
    assert "measurement" in trial
    digest = basis["basis"]["bundle"]
    result = ParetoSet.parse((out / "pareto.json").read_bytes())
    assert result.provenance["calibration"]["bundle"] == digest
    for url in (store.as_uri(), (out / "bundles").as_uri()):
        assert open_store(url).get_bundle(digest).digest == digest
    again = invoke(*arguments, 3)
    assert again.exit_code in (0, 65)
    assert "calibrating" not in again.stderr
    assert "measuring" in again.stderr
    other = invoke(*arguments, 3, "--calibration-tokens", 4096)
    assert other.exit_code == 64
    assert "different: calibration" in other.stderr


def test_an_infeasible_budget_is_65_after_writing(
    model_folder: Path, policy_file: Path, tmp_path: Path
) -> None:
    """The set is there, the exit code says that it does not help."""
    policy_file.write_text(POLICY.partition("  workloads")[0].replace("10000", "0"))
    out = tmp_path / "out"
    done = invoke("--model", model_folder, "--policy", policy_file, "--out", out, "--max-trials", 1)
    assert done.exit_code == 65
    assert "Infeasible: class default: budget 0 basis points" in done.stderr
    assert ParetoSet.parse((out / "pareto.json").read_bytes()).classes["default"][0].name == "none"


def test_an_unsupported_model_is_66(tmp_path: Path) -> None:
    """One line says what the model has instead of a KV cache."""
    transformers.MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    done = invoke("--model", tmp_path / "model", "--out", tmp_path / "out")
    assert done.exit_code == 66
    assert done.stderr.splitlines()[-1].startswith("kvserve profile: Unsupported: mamba:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--text", "nowhere.txt"], "can't read nowhere.txt", id="no-text"),
        pytest.param(["--text", "code=x.txt"], "there is no class 'code'", id="no-class"),
        pytest.param(["--text", "a.txt", "--text", "b.txt"], "two texts", id="two-texts"),
    ],
)
def test_bad_input_is_64(
    model_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """One line names the option and the remedy."""
    done = invoke("--model", model_folder, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 64
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_runs_folder_is_64(model_folder: Path, tmp_path: Path) -> None:
    """Trials of another seed are not mixed in."""
    arguments = ("--model", model_folder, "--out", tmp_path / "out", "--max-trials", 2)
    assert invoke(*arguments).exit_code == 0
    done = invoke(*arguments, "--seed", 7)
    assert done.exit_code == 64
    assert "different: settings" in done.stderr


def test_more_trials_extend_a_run(model_folder: Path, tmp_path: Path) -> None:
    """A larger budget of trials goes on where the smaller one ended."""
    arguments = ("--model", model_folder, "--out", tmp_path / "out", "--max-trials")
    assert invoke(*arguments, 2).exit_code == 0
    done = invoke(*arguments, 3)
    assert done.exit_code == 0
    assert "2/3 measuring" in done.stderr
    assert "measuring none" not in done.stderr


def test_texts_are_given_by_class() -> None:
    """Without a class the text is the default class's; a path may hold an equals sign."""
    assert text_files(["a.txt", "code=b=c.txt"]) == {
        "default": Path("a.txt"),
        "code": Path("b=c.txt"),
    }
    assert text_files(["./D=e.txt"]) == {"default": Path("./D=e.txt")}


def test_a_policys_text_must_be_given(policy_file: Path) -> None:
    """A text that lies in a ConfigMap can't be read here: the error says how to give it."""
    policy = read_policy(policy_file)
    with pytest.raises(SpecError, match=r"ConfigMap texts, key code: give code=FILE"):
        local_inputs(Path("m"), policy, {}, max_trials=None, seed=0)
    inputs = local_inputs(Path("m"), policy, {"code": Path("c")}, max_trials=None, seed=0)
    assert {name: c.max_loss_bp for name, c in inputs.classes.items()} == {
        "default": 10_000, "code": 9_000,
    }  # fmt: skip
    assert inputs.max_trials == 4


def test_a_policys_tasks_are_answered(model_folder: Path, tmp_path: Path) -> None:
    """Items from a file and built-in ones are answered, the table has a column for each, and the set the scores."""
    tasks = """
  quality:
    maxLossBasisPoints: 10000
    tasks:
    - {name: choice, configMapRef: {name: items}, maxLossBasisPoints: 10000}
"""
    text = POLICY.partition("  workloads")[0].replace(
        "  quality: {maxLossBasisPoints: 10000}", tasks
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(text)
    line = {"task": "multiple-choice", "question": "a b c d", "choices": ["e", "f"], "answer": 0}
    (tmp_path / "items.jsonl").write_text(json.dumps(line))
    out = tmp_path / "out"
    arguments = ("--model", model_folder, "--policy", policy, "--out", out)
    without = invoke(*arguments)
    assert without.exit_code == 64
    assert "ConfigMap items, key items.jsonl: give default/choice=FILE" in without.stderr
    unknown = invoke(*arguments, "--task", "sums=x")
    assert unknown.exit_code == 64
    done = invoke(*arguments, "--task", f"choice={tmp_path / 'items.jsonl'}")
    assert done.exit_code == 0, done.output
    result = ParetoSet.parse((out / "pareto.json").read_bytes())
    lossy = [p for p in result.profiles("default") if not p.lossless]
    assert lossy
    assert {p.tasks["choice"].items for p in lossy} == {1}
    assert "choice" in done.stdout
    assert "choice, at most bp" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("kind: Service", "must hold one KVServePolicy, holds 0"),
        (POLICY.replace("test/tiny", "test/tiny, nme: x"), "spec.model.nme"),
    ],
    ids=["no-yaml", "no-policy", "unknown-key"],
)
def test_a_wrong_policy_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The error names file or field."""
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_policy(path)


@pytest.mark.slow
def test_a_killed_process_goes_on(model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL after the second trial: the next process keeps both and measures the rest."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "kvserve_profiler", "profile", "--model", str(model_folder),
        "--out", str(out), "--forecasts", "0", "--max-trials", "6",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    log = out / "trials.jsonl"
    deadline_s = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_text().rpartition("\n")[0].splitlines()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode in (0, 65), done.stderr
    lines = log.read_text().splitlines()
    assert lines[: len(kept)] == kept
    trials = [json.loads(line) for line in lines[2:]]
    assert len({(trial["name"], trial["phase"]) for trial in trials}) == len(trials)
    assert "measuring none" not in done.stderr
