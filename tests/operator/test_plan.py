"""The plan as a table: each state has one answer, whatever led to it."""

import dataclasses
from typing import Any

import pytest

import samples
from kvserve_api.names import child_name
from kvserve_api.quality import TaskScore
from kvserve_operator.config import ArtifactsConfig, ProfilerConfig
from kvserve_operator.feasibility import quality_feasible
from kvserve_operator.jobs import PodFacts
from kvserve_operator.observed import Observed, RunFacts, TextFacts
from kvserve_operator.plan import Apply, plan
from kvserve_operator.sets import ProfileFacts
from operator_samples import (
    CONFIG,
    CURRENT,
    JOB,
    LONGER,
    OLD,
    SUSPENDED,
    brief,
    conditions,
    job,
    meta,
    observed,
    pareto,
    policy,
)

RUN = child_name("chat", "run", CURRENT)
CREATE = [
    f"apply ServiceAccount {JOB}",
    f"apply Role {JOB}",
    f"apply RoleBinding {JOB}",
    f"apply ConfigMap {RUN}",
    f"apply Job {JOB}",
]
OLD_JOB = child_name("chat", "job", OLD)
OLD_RUN = child_name("chat", "run", OLD)
CLEAN = [f"delete {kind} {OLD_JOB}" for kind in ("RoleBinding", "Role", "ServiceAccount")]
FAILED: dict[str, Any] = {
    "failed": True,
    "failure": ("BackoffLimitExceeded", "Job has reached the limit"),
}


@pytest.mark.parametrize(
    ("state", "does", "profiled"),
    [
        pytest.param(observed(), CREATE, ("False", "Profiling"), id="new"),
        pytest.param(
            observed(runs=(RunFacts(meta=meta("run")),)),
            CREATE,
            ("False", "Profiling"),
            id="job-missing",
        ),
        pytest.param(observed(jobs=(job(),)), [], ("False", "Profiling"), id="running"),
        pytest.param(
            observed(jobs=(job(),), sets=(pareto(),)), [], ("True", "Profiled"), id="set-there"
        ),
        pytest.param(observed(sets=(pareto(),)), [], ("True", "Profiled"), id="job-deleted-after"),
        pytest.param(
            observed(jobs=(job(complete=True),)), [], ("False", "ResultInvalid"), id="no-set"
        ),
        pytest.param(
            observed(jobs=(job(complete=True),), sets=(pareto(problem="is not JSON"),)),
            [],
            ("False", "ResultInvalid"),
            id="corrupt-set",
        ),
        pytest.param(
            observed(sets=(pareto(model="other"),)), [], ("False", "ResultInvalid"), id="model"
        ),
        pytest.param(
            observed(jobs=(job(**FAILED),)), [], ("False", "JobFailed"), id="failed-stays"
        ),
        pytest.param(
            observed(
                jobs=(
                    job(
                        failed=True,
                        failure=("PodFailurePolicy", "Container failed with exit code 66 matching"),
                    ),
                )
            ),
            [],
            ("False", "Unsupported"),
            id="code-from-the-job",
        ),
        pytest.param(
            observed(LONGER, jobs=(job(failed=True, failure=("DeadlineExceeded", "")),)),
            [f"delete Job {JOB}"],
            ("False", "DeadlineExceeded"),
            id="longer-deadline",
        ),
        pytest.param(
            observed(jobs=(job(resources_digest="other", **FAILED),)),
            [f"delete Job {JOB}"],
            ("False", "JobFailed"),
            id="other-resources",
        ),
        pytest.param(
            observed(
                LONGER,
                jobs=(job(failed=True, failure=("PodFailurePolicy", "exit code 64")),),
            ),
            [],
            ("False", "BadInput"),
            id="bad-input-stays",
        ),
        pytest.param(
            observed(jobs=(job(meta=meta("job", deleting=True), **FAILED),)),
            [],
            ("False", "JobFailed"),
            id="job-on-its-way-out",
        ),
        pytest.param(
            observed(LONGER, jobs=(job(),)),
            [f"tune {JOB} False 9000"],
            ("False", "Profiling"),
            id="deadline-of-a-running-job",
        ),
        pytest.param(observed(SUSPENDED), [], ("False", "Suspended"), id="suspended"),
        pytest.param(
            observed(SUSPENDED, jobs=(job(),)),
            [f"tune {JOB} True 7200"],
            ("False", "Suspended"),
            id="suspend-a-job",
        ),
        pytest.param(
            observed(jobs=(job(suspended=True),)),
            [f"tune {JOB} False 7200"],
            ("False", "Profiling"),
            id="resume-a-job",
        ),
        pytest.param(
            observed(SUSPENDED, sets=(pareto(OLD),)),
            [],
            ("True", "Suspended"),
            id="suspended-but-served",
        ),
        pytest.param(
            observed(
                jobs=(job(OLD),), runs=(RunFacts(meta=meta("run", OLD)),), sets=(pareto(OLD),)
            ),
            [*CREATE, *CLEAN, f"delete Job {OLD_JOB}", f"delete ConfigMap {OLD_RUN}"],
            ("True", "Reprofiling"),
            id="edited",
        ),
        pytest.param(
            observed(jobs=(job(),), runs=(RunFacts(meta=meta("run", OLD)),)),
            [*CLEAN, f"delete ConfigMap {OLD_RUN}"],
            ("False", "Profiling"),
            id="half-cleaned",
        ),
        pytest.param(
            observed(jobs=(job(), job(OLD, meta=meta("job", OLD, deleting=True)))),
            [],
            ("False", "Profiling"),
            id="cleaned",
        ),
        pytest.param(
            observed(jobs=(job(meta=meta("job", owner_uid="another")),)),
            [],
            ("False", "NameTaken"),
            id="job-of-a-former-policy",
        ),
        pytest.param(
            observed(jobs=(job(),), sets=(pareto(meta=meta("pareto", owner_uid="another")),)),
            [],
            ("False", "Profiling"),
            id="set-of-a-former-policy",
        ),
        pytest.param(
            observed(refused="to write Job x: 403 Forbidden"),
            CREATE,
            ("False", "WriteRefused"),
            id="refused",
        ),
        pytest.param(observed(winner="elder"), [], ("Unknown", "NotAccepted"), id="conflict"),
        pytest.param(
            observed(texts={"default": TextFacts(problem="create ConfigMap x")}),
            [],
            ("Unknown", "NotAccepted"),
            id="text-missing",
        ),
        pytest.param(
            observed(
                jobs=(job(**FAILED),),
                job_pods=(PodFacts(meta=meta("job"), job=JOB, exit_code=137, out_of_memory=True),),
            ),
            [],
            ("False", "OutOfMemory"),
            id="out-of-memory",
        ),
        pytest.param(
            observed(
                jobs=(job(),),
                job_pods=(PodFacts(meta=meta("job"), job=JOB, helps=True, unschedulable="full"),),
            ),
            [],
            ("False", "Profiling"),
            id="a-helper-waits",
        ),
        pytest.param(
            observed(
                jobs=(job(failed=True, failure=("PodFailurePolicy", "failed with exit code 64")),),
                job_pods=(PodFacts(meta=meta("job"), job=JOB, live=False, exit_code=143),),
            ),
            [],
            ("False", "BadInput"),
            id="another-pod-was-stopped",
        ),
        pytest.param(
            observed(
                jobs=(job(),),
                job_pods=(PodFacts(meta=meta("job"), job=JOB, config_problem="no ConfigMap x"),),
            ),
            [],
            ("False", "ContainerNotCreated"),
            id="config",
        ),
        pytest.param(
            observed(
                jobs=(job(),),
                job_pods=(
                    PodFacts(meta=meta("job"), job=JOB, live=False, image_problem="ErrImagePull"),
                ),
            ),
            [],
            ("False", "Profiling"),
            id="problem-of-a-pod-that-ended",
        ),
    ],
)
def test_plan(state: Observed, does: list[str], profiled: tuple[str, str]) -> None:
    """Each state has one plan and one answer about the profiling."""
    actions = plan(state, CONFIG)
    assert brief(actions) == does
    assert conditions(actions)["Profiled"] == profiled


def test_a_policy_on_its_way_out_is_left_alone() -> None:
    """Nothing is written about a policy that is being deleted."""
    facts = policy()
    leaving = dataclasses.replace(facts, meta=dataclasses.replace(facts.meta, deleting=True))
    assert plan(observed(leaving), CONFIG) == []


def test_the_job_fits_the_policy() -> None:
    """Model, texts, resources and the operator's own configuration are in the Job as they are given."""
    evaluation = {"configMapRef": {"name": "texts"}}
    facts = policy(
        model={"name": samples.MODEL, "source": {"pvc": {"claimName": "c", "path": "/a/b/"}}},
        workloads=[{"name": "code", "evaluation": evaluation}],
        profiling={"job": {"resources": {"limits": {"memory": "3Gi"}}}},
    )
    config = ProfilerConfig(
        image="profiler:1",
        extra_env=({"name": "HOME", "value": "/h"},),
        extra_volumes=({"name": "usr", "hostPath": {"path": "/usr"}},),
        extra_volume_mounts=({"name": "usr", "mountPath": "/usr"},),
        passed_env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://o"},
    )
    state = observed(facts, texts={"code": TextFacts(digest="sha256:" + "cd" * 32)})
    manifest = next(
        a.manifest
        for a in plan(state, config)
        if isinstance(a, Apply) and a.manifest["kind"] == "Job"
    )
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["KVSERVE_MODEL_PATH"] == "/model/a/b"
    assert env["HOME"] == "/h"
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://o"
    assert (env["KVSERVE_POLICY"], env["KVSERVE_POLICY_UID"]) == ("chat", "u1")
    assert container["resources"] == {"limits": {"memory": "3Gi"}}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts == {
        "run": "/etc/kvserve/run",
        "tmp": "/tmp",
        "texts": "/etc/kvserve/texts",
        "model": "/model",
        "usr": "/usr",
    }
    assert sorted(v["name"] for v in pod["volumes"]) == sorted(mounts)
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "model"]
    assert claims == [{"claimName": "c", "readOnly": True}]


def test_the_job_gets_the_items_of_tasks() -> None:
    """ConfigMaps with items are mounted by class and task, claims once each; missing items start nothing."""
    limit = {"maxLossBasisPoints": 1000}
    mine = {"name": "mine", "configMapRef": {"name": "items"}, **limit}
    disk = {"name": "disk", "pvc": {"claimName": "data", "path": "a.jsonl"}, **limit}
    facts = policy(
        quality={"tasks": [mine, disk, {"name": "facts", "builtIn": "Retrieval", **limit}]},
        workloads=[
            {"name": "code", "quality": {"tasks": [disk]}},
            {"name": "chat", "quality": {"tasks": [mine]}},
        ],
    )
    found = {
        (name, "mine"): TextFacts(digest="sha256:" + "cd" * 32) for name in ("default", "chat")
    }
    actions = plan(observed(facts, tasks=found), CONFIG)
    manifest = next(
        a.manifest for a in actions if isinstance(a, Apply) and a.manifest["kind"] == "Job"
    )
    pod = manifest["spec"]["template"]["spec"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["tasks"]["projected"]["sources"] == [
        {
            "configMap": {
                "name": "items",
                "items": [{"key": "items.jsonl", "path": f"{name}.mine.jsonl"}],
            }
        }
        for name in ("chat", "default")
    ]
    claims = [v for name, v in volumes.items() if name.startswith("claim-")]
    assert [v["persistentVolumeClaim"]["claimName"] for v in claims] == ["data"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["tasks"] == "/etc/kvserve/tasks"
    assert mounts["claim-0"] == "/etc/kvserve/claims/data"
    missing = plan(
        observed(facts, tasks={("chat", "mine"): TextFacts(problem="create ConfigMap items")}),
        CONFIG,
    )
    assert brief(missing) == []
    assert conditions(missing)["Accepted"] == ("False", "EvaluationMissing")


def test_a_failed_task_is_told() -> None:
    """Where all within the loss budget fail a task, the message names profile, task, limit and number of items."""
    task = {"name": "facts", "builtIn": "Retrieval", "maxLossBasisPoints": 500}
    facts = policy(quality={"maxLossBasisPoints": 100, "tasks": [task]})
    score = TaskScore(items=64, exact=0.9, compressed=0.85, loss_upper_bp=900.0)
    profiles = (ProfileFacts(name="int8", loss_upper_bp=4.2, tasks={"facts": score}),)
    finding = quality_feasible(facts.policy, pareto(losses={"default": profiles}))
    assert finding.reason == "BudgetTooTight"
    assert (
        "of profile int8, of task facts 500 basis points were allowed and 900 may be lost (64 items)"
        in finding.message
    )
    lossless = (*profiles, ProfileFacts(name="lossless", loss_upper_bp=0.0, lossless=True))
    assert quality_feasible(facts.policy, pareto(losses={"default": lossless})).true


def test_several_pods_are_an_indexed_job() -> None:
    """A policy that asks for pods gets a Job with an index for each; one that does not gets the usual one."""

    def spec(**job: int) -> dict[str, Any]:
        actions = plan(observed(policy(profiling={"job": job})), CONFIG)
        manifests = [a.manifest for a in actions if isinstance(a, Apply)]
        found: dict[str, Any] = next(m["spec"] for m in manifests if m["kind"] == "Job")
        return found

    several = spec(parallelism=3)
    assert several["completionMode"] == "Indexed"
    assert (several["completions"], several["parallelism"]) == (3, 3)
    assert "completionMode" not in spec(parallelism=1)


def test_the_job_gets_the_artifact_store() -> None:
    """URL, volume and Secret of the store are in the Job, which owns what it writes; another store is another run."""
    claim = {"persistentVolumeClaim": {"claimName": "bundles"}}
    store = ArtifactsConfig(url="file:///artifacts/kv", volume=claim, secret="keys")
    config = dataclasses.replace(CONFIG, artifacts=store)
    manifest = next(
        a.manifest
        for a in plan(observed(policy()), config)
        if isinstance(a, Apply) and a.manifest["kind"] == "Job"
    )
    assert manifest["metadata"]["name"] != JOB
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["KVSERVE_ARTIFACTS"] == "file:///artifacts/kv"
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "artifacts", "mountPath": "/artifacts/kv"} in container["volumeMounts"]
    assert {"name": "artifacts", **claim} in pod["volumes"]
    assert pod["securityContext"]["fsGroup"] == 1000


def test_without_a_store_the_job_knows_none() -> None:
    """Without a URL there is neither variable, nor volume, nor Secret, and the run is the one it always was."""
    manifest = next(
        a.manifest
        for a in plan(observed(policy()), CONFIG)
        if isinstance(a, Apply) and a.manifest["kind"] == "Job"
    )
    assert manifest["metadata"]["name"] == JOB
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert "KVSERVE_ARTIFACTS" not in {e["name"] for e in container["env"]}
    assert "envFrom" not in container
    assert "fsGroup" not in pod["securityContext"]
    assert "artifacts" not in {v["name"] for v in pod["volumes"]}
