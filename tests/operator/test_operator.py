"""What the operator does about one policy, with real Jobs and garbage collection and no node."""

import time
from functools import partial
from typing import Any

import pytest

import samples
from kube_api import Api, eventually
from kvserve_api.progress import Progress


def test_a_policy_becomes_a_job(shared: Api) -> None:
    """A new policy has its Job, its pod and its first status within seconds, and nothing of kopf's on it."""
    began = time.monotonic()
    shared.policy("born")
    job = shared.wait_job("born")
    shared.wait_reason("born", "Profiled", "Profiling")
    took_s = time.monotonic() - began
    shared.wait_pod(job["metadata"]["name"])
    name = job["metadata"]["name"]
    run = name.replace("-job-", "-run-")
    kinds = ("jobs", "roles", "rolebindings", "serviceaccounts")
    assert shared.children("born") == sorted(
        [f"configmaps/{run}", *(f"{kind}/{name}" for kind in kinds)]
    )
    policy = shared.get("kvp", "born") or {}
    assert "finalizers" not in policy["metadata"]
    assert "annotations" not in policy["metadata"]
    assert policy["status"]["observedGeneration"] == 1
    assert shared.condition("born", "TargetsResolved")[:2] == ("False", "NoPods")
    assert shared.condition("born", "Ready")[:2] == ("False", "Profiling")
    assert took_s < 5


def test_the_job_may_do_only_its_own(shared: Api) -> None:
    """The Role of a run names its two ConfigMaps, and the Job retries nothing that ends the same way."""
    shared.policy("narrow")
    job = shared.wait_job("narrow")
    name = job["metadata"]["name"]
    role = eventually(lambda: shared.get("roles", name), "Role")
    run, pareto = name.replace("-job-", "-run-"), name.replace("-job-", "-pareto-")
    rules = [(r["verbs"], r.get("resourceNames")) for r in role["rules"]]
    assert rules == [(["create"], None), (["get", "patch"], [run]), (["get"], [pareto])]
    assert {r["resources"][0] for r in role["rules"]} == {"configmaps"}
    first = job["spec"]["podFailurePolicy"]["rules"][0]
    assert (first["action"], first["onExitCodes"]["values"]) == ("FailJob", [64, 65, 66])
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in job["spec"]


def test_progress_is_told(shared: Api) -> None:
    """What the Job writes into its run's ConfigMap is in the status within ten seconds."""
    shared.policy("progress")
    job = shared.wait_job("progress")
    for done in (3, 4, 5):
        shared.write_progress(job, Progress(completed=done, failed=1, total=12, message="busy"))

    def told() -> dict[str, Any] | None:
        profiling = (shared.get("kvp", "progress") or {}).get("status", {}).get("profiling", {})
        return profiling if profiling.get("progress") == "6/12" else None

    profiling = eventually(told, "progress", timeout_s=10)
    assert profiling["trialsCompleted"] == 5
    assert profiling["trialsFailed"] == 1
    assert profiling["trialsTotal"] == 12
    assert profiling["message"] == "busy"


def test_from_the_set_to_ready_and_anew(shared: Api) -> None:
    """A finished policy is Ready, stays so while an edit is profiled anew, and keeps two sets."""
    shared.policy("whole")
    first = shared.wait_job("whole")
    old = shared.write_set(first, samples.pareto())
    shared.end_pod(first["metadata"]["name"], code=0)
    shared.wait_reason("whole", "Profiled", "Profiled")
    for role in ("prefill", "decode"):
        shared.run_pod(f"whole-{role}", {"app": f"whole-{role}"})
    shared.wait_reason("whole", "TargetsResolved", "PodsFound")
    assert shared.condition("whole", "Ready")[1] == "NotProgrammed"
    shared.report("whole", synced=1)
    assert shared.wait_reason("whole", "Ready", "Serving")[0] == "True"
    status = (shared.get("kvp", "whole") or {})["status"]
    assert status["synced"] == "2/2"
    assert status["pareto"] == {
        "configMapRef": {"name": old},
        "digest": samples.pareto().digest,
        "profiles": 4,
    }

    shared.patch("kvp", "whole", {"spec": {"profiling": {"budget": {"maxTrials": 8}}}})
    second = shared.wait_job("whole", other_than=first["metadata"]["name"])
    assert shared.wait_reason("whole", "Profiled", "Reprofiling")[0] == "True"
    assert shared.condition("whole", "Ready")[:2] == ("True", "Serving")
    assert (shared.get("kvp", "whole") or {})["status"]["pareto"]["configMapRef"]["name"] == old
    eventually(lambda: not shared.get("jobs", first["metadata"]["name"]), "end of the old Job")

    new = shared.write_set(second, samples.pareto(samples.INT8, samples.RAW))
    shared.wait_reason("whole", "Profiled", "Profiled")
    assert (shared.get("kvp", "whole") or {})["status"]["pareto"]["configMapRef"]["name"] == new
    second_name = second["metadata"]["name"]
    configmaps = (old, new, second_name.replace("-job-", "-run-"))
    kinds = ("jobs", "roles", "rolebindings", "serviceaccounts")
    left = [*(f"configmaps/{n}" for n in configmaps), *(f"{kind}/{second_name}" for kind in kinds)]
    eventually(lambda: shared.children("whole") == sorted(left), "only these children")


def test_a_budget_needs_no_new_run(shared: Api) -> None:
    """A changed quality budget is judged by the set there is: no other Job, and the least lossy profile is named."""
    shared.policy("budget")
    job = shared.wait_job("budget")
    shared.write_set(job, samples.pareto())
    shared.wait_reason("budget", "QualityFeasible", "Feasible")
    shared.patch("kvp", "budget", {"spec": {"quality": {"maxLossBasisPoints": 3}}})
    status, message = shared.wait_reason("budget", "QualityFeasible", "BudgetTooTight")
    assert status == "False"
    assert "the least loss is 4.0 basis points, of profile int8" in message
    assert "set spec.quality.maxLossBasisPoints to 4 or more" in message
    jobs = shared.find("jobs", "kvserve.io/policy=budget")
    assert [j["metadata"]["uid"] for j in jobs] == [job["metadata"]["uid"]]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (64, "BadInput"),
        pytest.param(65, "Infeasible", marks=pytest.mark.slow),
        pytest.param(66, "Unsupported", marks=pytest.mark.slow),
    ],
)
def test_a_typed_failure_is_told_and_not_repeated(shared: Api, code: int, reason: str) -> None:
    """An exit code that means the same every time fails the Job at once and leaves it as the record."""
    policy = f"code-{code}"
    shared.policy(policy)
    name = shared.wait_job(policy)["metadata"]["name"]
    shared.end_pod(name, code=code, message="details\nmodel.path: no such folder")
    status, message = shared.wait_reason(policy, "Profiled", reason)
    assert status == "False"
    assert "model.path: no such folder" in message
    assert f"delete Job {name}" in message
    assert len(shared.find("pods", f"batch.kubernetes.io/job-name={name}")) == 1

    def told() -> bool:
        events = [e for e in shared.find("events") if e["involvedObject"].get("name") == policy]
        return (reason, "Warning") in {(e["reason"], e["type"]) for e in events}

    eventually(told, "event")
    assert shared.find("jobs", f"kvserve.io/policy={policy}")[0]["metadata"]["name"] == name

    shared.delete("jobs", name)
    shared.wait_reason(policy, "Profiled", "Profiling")
    shared.wait_pod(name)


def test_out_of_memory_is_told_and_more_memory_resumes(shared: Api) -> None:
    """A killed container is told as such; with other resources the run goes on in a new Job of the same name."""
    shared.policy("memory")
    job = shared.wait_job("memory")
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    shared.patch("jobs", name, {"spec": {"backoffLimit": 0}})
    shared.end_pod(name, code=137, reason="OOMKilled")
    _, message = shared.wait_reason("memory", "Profiled", "OutOfMemory")
    assert "spec.profiling.job.resources.limits.memory" in message
    resources = {"limits": {"memory": "9Gi"}}
    shared.patch("kvp", "memory", {"spec": {"profiling": {"job": {"resources": resources}}}})

    def renewed() -> dict[str, Any] | None:
        found = shared.get("jobs", name)
        return found if found and found["metadata"]["uid"] != uid else None

    container = eventually(renewed, "new Job")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"] == resources
    shared.wait_reason("memory", "Profiled", "Profiling")


@pytest.mark.parametrize(
    ("status", "reason", "part"),
    [
        pytest.param(
            {
                "containerStatuses": [
                    {
                        "name": "profiler",
                        "image": "x",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 0,
                        "state": {
                            "waiting": {"reason": "ImagePullBackOff", "message": "no such image"}
                        },
                    }
                ]
            },
            "ImageUnavailable",
            "no such image",
            id="image",
        ),
        pytest.param(
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/1 nodes are available: 1 Insufficient cpu.",
                    }
                ]
            },
            "Unschedulable",
            "Insufficient cpu",
            id="no-node",
        ),
    ],
)
def test_a_stuck_pod_is_told(
    shared: Api, status: dict[str, Any], reason: str, part: str, request: pytest.FixtureRequest
) -> None:
    """A pod that can't start is told while it can't, and no longer."""
    policy = f"stuck-{request.node.callspec.id}"
    shared.policy(policy)
    name = shared.wait_job(policy)["metadata"]["name"]
    pod = shared.wait_pod(name)["metadata"]["name"]
    shared.patch("pods", f"{pod}/status", {"status": status})
    assert part in shared.wait_reason(policy, "Profiled", reason)[1]
    shared.patch("pods", f"{pod}/status", {"status": dict.fromkeys(status)})
    shared.wait_reason(policy, "Profiled", "Profiling")


def test_a_deadline_is_told_and_more_time_resumes(shared: Api) -> None:
    """A Job that took too long is told as such; a longer deadline makes it anew."""
    shared.policy("late")
    job = shared.wait_job("late")
    name = job["metadata"]["name"]
    shared.wait_pod(name)
    late = {"status": "True", "reason": "DeadlineExceeded", "message": "Job was active too long"}
    # the Job controller completes what it would begin itself after two hours
    conditions = [{"type": "FailureTarget", **late}]
    shared.patch("jobs", f"{name}/status", {"status": {"conditions": conditions}})
    _, message = shared.wait_reason("late", "Profiled", "DeadlineExceeded")
    assert "more than 7200 s" in message
    budget = {"activeDeadlineSeconds": 9000}
    shared.patch("kvp", "late", {"spec": {"profiling": {"budget": budget}}})

    def renewed() -> bool:
        found = shared.get("jobs", name)
        return found is not None and found["metadata"]["uid"] != job["metadata"]["uid"]

    eventually(renewed, "new Job")
    assert (shared.get("jobs", name) or {})["spec"]["activeDeadlineSeconds"] == 9000


def test_a_running_job_is_given_more_time(shared: Api) -> None:
    """A deadline that is edited while the Job runs applies to it."""
    shared.policy("longer")
    name = shared.wait_job("longer")["metadata"]["name"]
    budget = {"activeDeadlineSeconds": 8000}
    shared.patch("kvp", "longer", {"spec": {"profiling": {"budget": budget}}})
    eventually(
        lambda: (shared.get("jobs", name) or {})["spec"]["activeDeadlineSeconds"] == 8000,
        "longer deadline",
    )


def test_a_corrupt_result_is_not_adopted(shared: Api) -> None:
    """A set whose document was changed is refused with what to do, and the set before it keeps serving."""
    shared.policy("corrupt")
    first = shared.wait_job("corrupt")
    old = shared.write_set(first, samples.pareto())
    shared.wait_reason("corrupt", "Profiled", "Profiled")
    shared.patch("kvp", "corrupt", {"spec": {"profiling": {"budget": {"maxTrials": 8}}}})
    second = shared.wait_job("corrupt", other_than=first["metadata"]["name"])
    document = samples.pareto().canonical().decode().replace("int8", "int9")
    shared.write_set(second, samples.pareto(), data={"pareto.json": document})
    status, message = shared.wait_reason("corrupt", "Profiled", "ResultInvalid")
    assert status == "False"
    assert "was changed" in message
    assert f"delete Job {second['metadata']['name']}" in message
    assert f"the set {old} keeps serving" in message
    assert (shared.get("kvp", "corrupt") or {})["status"]["pareto"]["configMapRef"]["name"] == old


def test_a_missing_result_is_told(shared: Api) -> None:
    """A Job that ended well but left no set is told, and not run again."""
    shared.policy("missing")
    name = shared.wait_job("missing")["metadata"]["name"]
    shared.end_pod(name, code=0)
    message = shared.wait_reason("missing", "Profiled", "ResultInvalid")[1]
    assert f"ConfigMap {name.replace('-job-', '-pareto-')} is not there" in message


def test_a_set_of_another_model_is_refused(shared: Api) -> None:
    """A set that was measured on another model is not in force."""
    shared.policy("foreign")
    shared.write_set(shared.wait_job("foreign"), samples.pareto(model="other/model"))
    message = shared.wait_reason("foreign", "Profiled", "ResultInvalid")[1]
    assert "was measured on the model other/model" in message
    assert "pareto" not in (shared.get("kvp", "foreign") or {})["status"]


def test_a_missing_text_is_told_and_found(shared: Api) -> None:
    """Without its evaluation text a policy is not accepted; the text starts the run and is mounted by class."""
    evaluation = {"configMapRef": {"name": "texts", "key": "code"}}
    shared.policy("reads", workloads=[{"name": "code", "evaluation": evaluation}])
    status, message = shared.wait_reason("reads", "Accepted", "EvaluationMissing")
    assert status == "False"
    assert "class code: create ConfigMap texts with the key code" in message
    assert shared.find("jobs", "kvserve.io/policy=reads") == []
    shared.create("configmaps", {"metadata": {"name": "texts"}, "data": {"code": "x = 1\n"}})
    job = shared.wait_job("reads")
    volumes = job["spec"]["template"]["spec"]["volumes"]
    texts = next(v for v in volumes if v["name"] == "texts")["projected"]["sources"]
    assert texts == [
        {"configMap": {"name": "texts", "items": [{"key": "code", "path": "code.txt"}]}}
    ]


def test_missing_items_are_told_and_found(shared: Api) -> None:
    """Without the items of a task a policy is not accepted; they start the run, and an edit starts another."""
    reference = {"configMapRef": {"name": "items"}}
    task = {"name": "facts", "maxLossBasisPoints": 5000, **reference}
    shared.policy("asks", quality={"maxLossBasisPoints": 100, "tasks": [task]})
    message = shared.wait_reason("asks", "Accepted", "EvaluationMissing")[1]
    assert "task facts of workload class default: create ConfigMap items with the key" in message
    shared.create("configmaps", {"metadata": {"name": "items"}, "data": {"items.jsonl": "{}"}})
    job = shared.wait_job("asks")
    volumes = job["spec"]["template"]["spec"]["volumes"]
    sources = next(v for v in volumes if v["name"] == "tasks")["projected"]["sources"]
    assert sources[0]["configMap"]["items"] == [
        {"key": "items.jsonl", "path": "default.facts.jsonl"}
    ]


def test_the_older_policy_wins(shared: Api) -> None:
    """A policy whose pods belong to an older one is not accepted until the older one is deleted."""
    shared.policy("elder")
    shared.wait_job("elder")
    time.sleep(1.1)  # creation times have seconds
    targets = samples.policy_object("elder")["spec"]["targets"]
    shared.policy("aaa-younger", targets=targets)
    status, message = shared.wait_reason("aaa-younger", "Accepted", "Conflicted")
    assert status == "False"
    assert "the older policy elder selects the same pods" in message
    assert shared.condition("elder", "Accepted")[0] == "True"
    assert shared.find("jobs", "kvserve.io/policy=aaa-younger") == []
    shared.delete("kvp", "elder")
    shared.wait_reason("aaa-younger", "Accepted", "Accepted")
    shared.wait_job("aaa-younger")


def test_one_role_per_pod(shared: Api) -> None:
    """Selectors that give a pod both roles are told, which no rule of the CRD can see."""
    targets = [
        {"role": "Prefill", "selector": {"matchLabels": {"app": "x"}}},
        {"role": "Decode", "selector": {"matchLabels": {"app": "x", "tier": "y"}}},
    ]
    shared.policy("both", targets=targets)
    assert "spec.targets" in shared.wait_reason("both", "Accepted", "InvalidPolicy")[1]


def test_suspend(shared: Api) -> None:
    """A suspended policy starts no run, and a running one pauses and goes on."""
    shared.policy("paused", profiling={"suspend": True})
    shared.wait_reason("paused", "Profiled", "Suspended")
    assert shared.find("jobs", "kvserve.io/policy=paused") == []
    shared.patch("kvp", "paused", {"spec": {"profiling": {"suspend": False}}})
    name = shared.wait_job("paused")["metadata"]["name"]

    def is_suspended(wanted: bool) -> bool:
        return bool((shared.get("jobs", name) or {})["spec"]["suspend"] == wanted)

    for suspend in (True, False):
        shared.patch("kvp", "paused", {"spec": {"profiling": {"suspend": suspend}}})
        eventually(partial(is_suspended, suspend), f"suspend {suspend}")


def test_deleting_leaves_nothing(shared: Api) -> None:
    """Deleting a policy takes no time and leaves none of its children."""
    shared.policy("gone")
    job = shared.wait_job("gone")
    shared.write_set(job, samples.pareto())
    shared.wait_reason("gone", "Profiled", "Profiled")
    assert len(shared.children("gone")) == 6
    began = time.monotonic()
    shared.delete("kvp", "gone")
    assert shared.get("kvp", "gone") is None
    assert time.monotonic() - began < 1
    eventually(lambda: not shared.children("gone"), "end of the children", timeout_s=60)
    pods = f"batch.kubernetes.io/job-name={job['metadata']['name']}"
    eventually(lambda: not shared.find("pods", pods), "end of the pods", timeout_s=60)


def test_made_anew_at_once(shared: Api) -> None:
    """A policy that is deleted and made anew takes none of the old one's children for its own."""
    shared.policy("phoenix")
    old = shared.wait_job("phoenix")
    shared.delete("kvp", "phoenix")
    uid = shared.policy("phoenix")["metadata"]["uid"]

    def settled() -> dict[str, Any] | None:
        job = shared.get("jobs", old["metadata"]["name"])
        owners = [o["uid"] for o in job["metadata"]["ownerReferences"]] if job else []
        return job if owners == [uid] else None

    eventually(settled, "a Job of the new policy alone", timeout_s=60)
    shared.wait_reason("phoenix", "Profiled", "Profiling")
