"""The Job against a real API server, under a ServiceAccount that may do only what its Role says."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import InfeasibleError, SpecError, UnavailableError
from kvserve_api.names import child_name
from kvserve_api.profile_set import ParetoSet
from kvserve_api.progress import Progress
from kvserve_api.run import ClassInputs, RunInputs, TaskInputs
from kvserve_profiler.__main__ import job
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.configmaps import Owner, RunConfigMaps
from kvserve_profiler.job import JobOptions, run_job
from kvserve_profiler.trials import TrialLog, basis_of
from kvserve_strategies.artifacts import open_store
from random_bundles import joint_strategy
from testcluster import Cluster

CRD = Path(__file__).parents[2] / "crds" / "kvservepolicies.yaml"
POLICY = "chat"
ITEMS = b"""
{"task": "multiple-choice", "question": "one two three", "choices": ["four", "five"], "answer": 0}
{"task": "last-word", "text": "one two three four"}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A namespace as the operator prepares it for a Job."""

    cluster: Cluster
    namespace: str
    inputs: RunInputs
    options: JobOptions
    environment: dict[str, str]

    @property
    def run_name(self) -> str:
        """The run's ConfigMap."""
        return child_name(POLICY, "run", self.inputs.digest)

    @property
    def pareto_name(self) -> str:
        """The result's ConfigMap."""
        return child_name(POLICY, "pareto", self.inputs.digest)

    def get(self, name: str) -> dict[str, Any]:
        """Read a ConfigMap as the administrator."""
        text = self.cluster.kubectl("-n", self.namespace, "get", "configmap", name, "-o", "json")
        value: dict[str, Any] = json.loads(text)
        return value

    def progress(self) -> Progress:
        """Read the run's progress."""
        return Progress.parse(self.get(self.run_name)["data"]["progress.json"])

    def maps(self) -> RunConfigMaps:
        """Connect as the Job does."""
        return RunConfigMaps(self.options.owner, self.inputs.digest, sleep=lambda _: None)


def manifest(kind: str, name: str, version: str = "v1", **rest: Any) -> dict[str, Any]:
    """Return an object."""
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}


def rbac(inputs: RunInputs) -> list[dict[str, Any]]:
    """Return the Job's ServiceAccount with its Role."""
    group = "rbac.authorization.k8s.io"
    run, pareto = (child_name(POLICY, kind, inputs.digest) for kind in ("run", "pareto"))
    resource = {"apiGroups": [""], "resources": ["configmaps"]}
    rules = [
        resource | {"verbs": ["create"]},
        resource | {"verbs": ["get", "patch"], "resourceNames": [run]},
        resource | {"verbs": ["get"], "resourceNames": [pareto]},
    ]
    return [
        manifest("ServiceAccount", "job"),
        manifest("Role", "job", f"{group}/v1", rules=rules),
        manifest(
            "RoleBinding",
            "job",
            f"{group}/v1",
            roleRef={"apiGroup": group, "kind": "Role", "name": "job"},
            subjects=[{"kind": "ServiceAccount", "name": "job"}],
        ),
    ]


@pytest.fixture
def stage(
    control_plane: Cluster,
    namespace: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Stage:
    """A policy with a planned run, and this process in the role of its Job."""
    inputs = RunInputs(
        policy=f"{namespace}/{POLICY}",
        model="test/tiny",
        revision="",
        model_source="pvc:models/",
        classes={
            "default": ClassInputs(max_loss_bp=10_000),
            "words": ClassInputs(
                max_loss_bp=10_000,
                text_digest=digest_bytes(b"words " * 300),
                tasks={
                    "mapped": TaskInputs(
                        source="configmap", items=9, max_loss_bp=10_000, digest=digest_bytes(ITEMS)
                    ),
                    "stored": TaskInputs(source="pvc:data/a/b.jsonl", items=1, max_loss_bp=10_000),
                },
            ),
        },
        max_trials=4,
    )
    (tmp_path / "inputs.json").write_bytes(inputs.canonical())
    (tmp_path / "words.txt").write_bytes(b"words " * 300)
    (tmp_path / "words.mapped.jsonl").write_bytes(ITEMS)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "b.jsonl").write_bytes(ITEMS)
    control_plane.kubectl("apply", "--server-side", "-f", str(CRD))
    control_plane.wait_established("kvservepolicies.kvserve.io")
    targets = [
        {"role": role, "selector": {"matchLabels": {"app": role}}} for role in ("Prefill", "Decode")
    ]
    spec = {"model": {"name": "test/tiny"}, "targets": targets}
    run_map = manifest(
        "ConfigMap",
        child_name(POLICY, "run", inputs.digest),
        data={"inputs.json": inputs.canonical().decode()},
    )
    objects = [manifest("KVServePolicy", POLICY, "kvserve.io/v1alpha1", spec=spec), run_map]
    control_plane.kubectl(
        "-n", namespace, "apply", "-f", "-",
        input=yaml.safe_dump_all([*objects, *rbac(inputs)]),
    )  # fmt: skip
    uid = control_plane.kubectl(
        "-n", namespace, "get", "kvp", POLICY, "-o", "jsonpath={.metadata.uid}"
    )
    kubeconfig = yaml.safe_load(control_plane.kubeconfig.read_text())
    token = control_plane.kubectl("-n", namespace, "create", "token", "job").strip()
    kubeconfig["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    environment = os.environ | {
        "KVSERVE_INPUTS": str(tmp_path / "inputs.json"),
        "KVSERVE_TEXTS": str(tmp_path),
        "KVSERVE_TASKS": str(tmp_path),
        "KVSERVE_CLAIMS": str(tmp_path),
        "KVSERVE_MODEL_PATH": str(model_folder),
        "KVSERVE_NAMESPACE": namespace,
        "KVSERVE_POLICY": POLICY,
        "KVSERVE_POLICY_UID": uid,
        "KVSERVE_TERMINATION_LOG": str(tmp_path / "termination-log"),
        "OMP_NUM_THREADS": "1",
    }
    return Stage(
        cluster=control_plane,
        namespace=namespace,
        inputs=inputs,
        options=JobOptions(
            inputs=tmp_path / "inputs.json",
            texts=tmp_path,
            tasks=tmp_path,
            claims=tmp_path,
            model=str(model_folder),
            owner=Owner(namespace=namespace, name=POLICY, uid=uid),
        ),
        environment=environment,
    )


def test_a_job_publishes_and_a_second_one_changes_nothing(
    stage: Stage, space: tuple[Candidate, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """The set is immutable, named, labelled, owned; progress and trials are there; a repeat measures nothing."""
    message = run_job(stage.options, space)
    made = stage.get(stage.pareto_name)
    result = ParetoSet.parse(made["data"]["pareto.json"].encode())
    owner = stage.options.owner
    assert made["immutable"] is True
    assert made["metadata"]["labels"] == {
        "kvserve.io/policy": POLICY,
        "kvserve.io/artifact": "pareto",
        "kvserve.io/run": stage.pareto_name[-10:],
    }
    assert made["metadata"]["annotations"] == {
        "kvserve.io/digest": result.digest,
        "kvserve.io/inputs": stage.inputs.digest,
    }
    (reference,) = made["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["uid"]) == ("KVServePolicy", owner.uid)
    assert set(result.classes) == {"default", "words"}
    assert stage.progress() == Progress(completed=4, failed=0, total=4, message=message)
    lossy = [profile for profile in result.profiles("words") if not profile.lossless]
    scores = {(name, score.items) for p in lossy for name, score in p.tasks.items()}
    assert scores == {("mapped", 2), ("stored", 1)}
    assert not any(profile.tasks for profile in result.profiles("default"))
    lines = stage.get(stage.run_name)["data"]["trials.jsonl"].splitlines()
    assert len(lines) == 10 + 2 * len(lossy)
    assert stage.get(stage.run_name)["data"]["inputs.json"] == stage.inputs.canonical().decode()
    capfd.readouterr()
    assert run_job(stage.options, space) == message
    assert "measuring" not in capfd.readouterr().err
    assert stage.get(stage.pareto_name)["metadata"]["uid"] == made["metadata"]["uid"]


def test_forecasts_are_made_where_they_are_asked_for(
    stage: Stage, space: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`KVSERVE_FORECASTS` says by how many gradients a Job forecasts losses; without it, by none."""
    assert stage.options.task(stage.inputs, space).settings.gradients == 0
    monkeypatch.setenv("KVSERVE_FORECASTS", "3")
    asked = job.make_context("job", []).params["gradients"]
    options = dataclasses.replace(stage.options, gradients=asked)
    assert options.task(stage.inputs, space).settings.gradients == 3


def test_without_a_store_the_job_says_what_it_left_out(
    stage: Stage, space: tuple[Candidate, ...]
) -> None:
    """Strategies that need a bundle are not measured where there is no store for it, and the last message tells."""
    joint = Candidate(name="joint", strategy=joint_strategy(layers=2))
    message = run_job(stage.options, (*space[:2], joint))
    result = ParetoSet.parse(stage.get(stage.pareto_name)["data"]["pareto.json"].encode())
    assert "joint" not in {profile.name for profile in result.profiles("default")}
    assert "KVSERVE_ARTIFACTS" in result.provenance["calibration"]["none"]
    assert "nothing calibrated was measured" in message
    assert stage.progress() == Progress(completed=2, failed=0, total=2, message=message)


def test_a_job_that_is_repeated_calibrates_once(
    stage: Stage,
    space: tuple[Candidate, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The bundle is in the store before the set names it; a second pod fetches it and measures nothing."""
    monkeypatch.setenv("KVSERVE_CACHE_DIR", str(tmp_path / "cache"))
    url = (tmp_path / "store").as_uri()
    options = dataclasses.replace(stage.options, artifacts=url, calibration_tokens=2048)
    joint = Candidate(name="joint", strategy=joint_strategy(layers=2, space="query"))
    message = run_job(options, (*space[:2], joint))
    assert "calibrating" in capfd.readouterr().err
    log = stage.get(stage.run_name)["data"]["trials.jsonl"]
    bundle = open_store(url).get_bundle(basis_of(log)["bundle"])
    assert bundle.model_fingerprint == basis_of(log)["fingerprint"]
    result = ParetoSet.parse(stage.get(stage.pareto_name)["data"]["pareto.json"].encode())
    assert result.provenance["calibration"]["bundle"] == bundle.digest
    assert stage.progress() == Progress(completed=3, failed=0, total=3, message=message)
    assert run_job(options, (*space[:2], joint)) == message
    said = capfd.readouterr().err
    assert "calibrating" not in said
    assert "measuring" not in said


def test_a_set_that_exists_stays(stage: Stage, space: tuple[Candidate, ...]) -> None:
    """Another result of the same run is reported and not written."""
    run_job(stage.options, space)
    before = stage.get(stage.pareto_name)
    result = ParetoSet.parse(before["data"]["pareto.json"].encode())
    maps = stage.maps()
    message = maps.publish(dataclasses.replace(result, provenance={"other": 1}))
    maps.close()
    assert message.startswith(f"kept ConfigMap {stage.pareto_name} with digest {result.digest}")
    assert stage.get(stage.pareto_name) == before


def test_an_infeasible_run_publishes_and_says_so(
    stage: Stage, space: tuple[Candidate, ...]
) -> None:
    """The set is there, and the progress carries the message of the exit code."""
    inputs = dataclasses.replace(
        stage.inputs,
        classes={n: dataclasses.replace(c, max_loss_bp=0) for n, c in stage.inputs.classes.items()},
    )
    stage.options.inputs.write_bytes(inputs.canonical())
    with pytest.raises(InfeasibleError, match=r"class default.*class words.*maxLossBasisPoints"):
        run_job(stage.options, space)
    assert stage.get(stage.pareto_name)["immutable"] is True
    assert stage.progress().message.startswith("Infeasible: class default: budget 0 basis points")


def test_trials_of_another_version_are_measured_anew(
    stage: Stage, space: tuple[Candidate, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """A log that an earlier pod left with other settings or another processor is not mixed in."""
    log = TrialLog(basis={"device": "cpu-of-yesterday"})
    maps = stage.maps()
    maps.save(Progress(total=4), log)
    maps.close()
    run_job(stage.options, space)
    assert "trials of an earlier pod not used" in capfd.readouterr().err
    assert stage.progress().completed == 4


def test_an_edited_text_ends_the_run_with_a_message(
    stage: Stage, space: tuple[Candidate, ...]
) -> None:
    """Bad input is told in the progress, and nothing is published."""
    (stage.options.texts / "words.txt").write_text("edited")
    with pytest.raises(SpecError, match="edited after the run was planned"):
        run_job(stage.options, space)
    assert "edited after the run was planned" in stage.progress().message
    names = stage.cluster.kubectl("-n", stage.namespace, "get", "configmap", "-o", "name")
    assert stage.pareto_name not in names


def test_edited_items_end_the_run_with_a_message(
    stage: Stage, space: tuple[Candidate, ...]
) -> None:
    """Items other than those of the ConfigMap that the run was planned for are bad input."""
    (stage.options.tasks / "words.mapped.jsonl").write_bytes(ITEMS + b"\n")
    with pytest.raises(SpecError, match=r"tasks\.mapped.*edited after the run was planned"):
        run_job(stage.options, space)


def test_what_the_role_forbids_is_worth_a_retry(stage: Stage) -> None:
    """A missing Role may be a Role that is not there yet: the pod fails, and the Job tries again."""
    stage.cluster.kubectl("-n", stage.namespace, "delete", "rolebinding", "job")
    maps = stage.maps()
    with pytest.raises(UnavailableError, match="no success in 5 attempts"):
        maps.load()
    maps.close()


@pytest.mark.slow
def test_the_result_goes_with_the_policy(stage: Stage, space: tuple[Candidate, ...]) -> None:
    """Deleting the policy deletes the set: the garbage collector follows the owner reference.

    It takes up to a minute, because the collector looks for new kinds of objects every 30 s.
    """
    run_job(stage.options, space)
    stage.cluster.kubectl("-n", stage.namespace, "delete", "kvp", POLICY)
    stage.cluster.kubectl(
        "-n", stage.namespace, "wait", "--for=delete", f"configmap/{stage.pareto_name}",
        "--timeout=120s", timeout_s=130,
    )  # fmt: skip


def start(stage: Stage, *, index: int = 0) -> "subprocess.Popen[str]":
    """Start the Job's process, of several pods that of an index."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvserve_profiler", "job"],
        env=stage.environment | {"JOB_COMPLETION_INDEX": str(index)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("good", 0, "holds the set with digest sha256:"),
        ("no-inputs", 64, "InvalidSpec: inputs: can't read"),
        ("tight", 65, "Infeasible: class default: budget 0"),
        ("mamba", 66, "Unsupported: mamba"),
        ("no-api-server", 1, "Unavailable: "),
    ],
)
def test_exit_codes_of_the_real_process(stage: Stage, case: str, code: int, message: str) -> None:
    """Each end has its exit code, one last line, and a termination message."""
    folder = stage.options.texts
    termination_log = folder / "termination-log"
    termination_log.touch()
    if case == "no-inputs":
        stage.options.inputs.unlink()
    if case == "tight":
        inputs = json.loads(stage.options.inputs.read_text())
        inputs["classes"]["default"]["max_loss_bp"] = 0
        inputs["max_trials"] = 1
        stage.options.inputs.write_text(json.dumps(inputs))
    if case == "mamba":
        transformers.MambaConfig(num_hidden_layers=1).save_pretrained(folder / "mamba")
        stage.environment["KVSERVE_MODEL_PATH"] = str(folder / "mamba")
    if case == "no-api-server":
        kubeconfig = yaml.safe_load((folder / "kubeconfig").read_text())
        kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
        (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    if case == "tight":
        stage.cluster.kubectl(
            "-n", stage.namespace, "create", "rolebinding", "all", "--clusterrole=edit",
            f"--serviceaccount={stage.namespace}:job",
        )  # fmt: skip
        digest = RunInputs.parse(stage.options.inputs.read_bytes()).digest
        stage.cluster.kubectl(
            "-n", stage.namespace, "create", "configmap", child_name(POLICY, "run", digest)
        )
    with start(stage) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    last = errors.splitlines()[-1]
    assert last.startswith("kvserve-profiler: ")
    assert message in last
    assert termination_log.read_text() == last.removeprefix("kvserve-profiler: ")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_stopped_pod_loses_nothing(stage: Stage) -> None:
    """SIGTERM saves what is finished; the next pod of the run measures only the rest."""
    inputs = dataclasses.replace(stage.inputs, max_trials=10)
    stage.options.inputs.write_bytes(inputs.canonical())
    again = dataclasses.replace(stage, inputs=inputs)
    stage.cluster.kubectl(
        "-n", stage.namespace, "apply", "-f", "-",
        input=yaml.safe_dump_all([manifest("ConfigMap", again.run_name), *rbac(inputs)]),
    )  # fmt: skip
    with start(again) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("2/10"):
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    kept = again.get(again.run_name)["data"]["trials.jsonl"].splitlines()
    assert len(kept) >= 3
    with start(again) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "measuring none" not in errors
    lines = again.get(again.run_name)["data"]["trials.jsonl"].splitlines()
    assert lines[: len(kept)] == kept
    phases = [json.loads(line)["phase"] for line in lines[2:]]
    assert phases.count("search") == 10
    assert 2 <= phases.count("confirm") <= 10


@pytest.mark.slow
def test_pods_of_a_job_share_its_trials(stage: Stage) -> None:
    """Both pods are killed at some time and come again; nothing is measured twice into the log, and both end well."""
    inputs = dataclasses.replace(stage.inputs, max_trials=12, parallelism=2)
    stage.options.inputs.write_bytes(inputs.canonical())
    again = dataclasses.replace(stage, inputs=inputs)
    stage.cluster.kubectl(
        "-n", stage.namespace, "apply", "-f", "-",
        input=yaml.safe_dump_all([manifest("ConfigMap", again.run_name), *rbac(inputs)]),
    )  # fmt: skip
    helper, chief = start(again, index=1), start(again)
    assert helper.stderr is not None
    assert chief.stderr is not None
    for line in helper.stderr:
        if line.startswith("measuring"):
            helper.kill()
            break
    helper.communicate(timeout=60)
    helper = start(again, index=1)
    for line in chief.stderr:
        if line.startswith("5/12"):
            chief.kill()
            break
    chief.communicate(timeout=60)
    with start(again) as chief:
        _, errors = chief.communicate(timeout=240)
    assert chief.returncode == 0, errors
    _, told = helper.communicate(timeout=60)
    assert helper.returncode == 0, told
    data = again.get(again.run_name)["data"]
    trials = [json.loads(line) for line in data["trials.jsonl"].splitlines()[2:]]
    keys = [(t["phase"], t["name"], t.get("task")) for t in trials]
    assert len(keys) == len(set(keys))
    assert sum(t["phase"] == "search" for t in trials) == 12
    assert "pod 1 measured" in told
    assert " measured 0 trials" not in told
    assert json.loads(data["work.json"])["done"] is True
