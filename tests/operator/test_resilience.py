"""The operator when it is killed, restarted, doubled, cut off, or refused."""

import signal
import time
from collections.abc import Callable

import pytest

import samples
from kube_api import Api, eventually
from operator_process import Operator

StartOperator = Callable[..., Operator]


def state(api: Api) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return the children of the policy ``chat`` and its conditions without times."""
    conditions = (api.get("kvp", "chat") or {})["status"]["conditions"]
    return api.children("chat"), [(c["type"], c["status"], c["reason"]) for c in conditions]


def expected(api: Api) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return the state of a policy whose Job runs."""
    name = api.wait_job("chat")["metadata"]["name"]
    kinds = ("jobs", "roles", "rolebindings", "serviceaccounts")
    children = [*(f"{k}/{name}" for k in kinds), f"configmaps/{name.replace('-job-', '-run-')}"]
    return sorted(children), [
        ("Accepted", "True", "Accepted"),
        ("TargetsResolved", "False", "NoPods"),
        ("Profiled", "False", "Profiling"),
        ("QualityFeasible", "Unknown", "NoProfiles"),
        ("Ready", "False", "Profiling"),
    ]


def kill_at(start: StartOperator, api: Api, number: int, *, before: bool) -> Operator:
    """Let an operator work on the policy ``chat``, kill it at its n-th write, and let another go on."""
    first = start(api.namespace)
    gate = first.gate
    gate.trap, gate.on_trap = (number, before), first.process.kill
    api.policy("chat")
    first.process.wait(30)
    assert first.process.returncode == -signal.SIGKILL
    gate.trap = None
    # nobody gave the lease back: it would be waited for
    api.patch("leases", "kvserve-operator", {"spec": {"holderIdentity": ""}})
    return start(api.namespace, gate=gate)


WRITES = 7
"""Of a new policy: service account, role, role binding, ConfigMap, Job, event, status."""
CUTS = [(number, before) for number in range(1, WRITES + 1) for before in (True, False)]
FAST = [(6, True)]


@pytest.mark.parametrize(
    ("number", "before"),
    [
        pytest.param(*cut, marks=[] if cut in FAST else [pytest.mark.slow], id=f"{cut[0]}-{cut[1]}")
        for cut in CUTS
    ],
)
def test_killed_between_two_actions(
    alone: Api, start_operator: StartOperator, number: int, before: bool
) -> None:
    """Killed right before or after any of its writes, an operator ends in the same state, with one Job."""
    second = kill_at(start_operator, alone, number, before=before)
    goal = expected(alone)
    eventually(lambda: "status" in (alone.get("kvp", "chat") or {}), "status")
    eventually(lambda: state(alone) == goal, "the same state")
    job = alone.wait_job("chat")
    second.gate.settle(quiet_s=0.5)
    assert [j["metadata"]["uid"] for j in alone.find("jobs")] == [job["metadata"]["uid"]]
    second.end(signal.SIGKILL)


def test_a_restart_with_nothing_to_do_writes_nothing(
    alone: Api, start_operator: StartOperator
) -> None:
    """A restarted operator looks at all policies and writes nothing; the second leads soon after the first ends."""
    first = start_operator(alone.namespace)
    for name in ("one", "two", "three"):
        alone.policy(name)
        job = alone.wait_job(name)
        if name != "one":
            alone.write_set(job, samples.pareto())
            alone.wait_reason(name, "Profiled", "Profiled")
    first.gate.settle(quiet_s=0.7)
    first.end()
    assert first.process.returncode == 0, first.log.read_text()
    versions = [p["metadata"]["resourceVersion"] for p in alone.find("kvp")]
    first.gate.writes.clear()

    second = start_operator(alone.namespace, gate=first.gate)
    second.wait_ready()
    holder = (alone.get("leases", "kvserve-operator") or {})["spec"]["holderIdentity"]
    assert holder
    time.sleep(1)
    assert second.gate.writes == []
    assert [p["metadata"]["resourceVersion"] for p in alone.find("kvp")] == versions
    # it is awake: a new policy is worked on
    alone.policy("four")
    alone.wait_job("four")
    assert second.gate.writes
    second.end()


@pytest.mark.slow
def test_down_while_edited_and_deleted(alone: Api, start_operator: StartOperator) -> None:
    """Policies that are edited or deleted while no operator runs are caught up with; a delete does not wait for one."""
    first = start_operator(alone.namespace)
    alone.policy("edited")
    alone.policy("deleted")
    old = alone.wait_job("edited")["metadata"]["name"]
    alone.wait_job("deleted")
    first.gate.settle()
    first.end()
    alone.delete("kvp", "deleted")
    assert alone.get("kvp", "deleted") is None
    alone.patch("kvp", "edited", {"spec": {"profiling": {"budget": {"maxTrials": 5}}}})
    second = start_operator(alone.namespace, gate=first.gate)
    alone.wait_job("edited", other_than=old)
    eventually(lambda: alone.get("jobs", old) is None, "end of the old Job")
    eventually(lambda: not alone.children("deleted"), "end of the children", timeout_s=60)
    second.end()


@pytest.mark.slow
def test_faults_are_waited_out(alone: Api, start_operator: StartOperator) -> None:
    """An API server that is overloaded or fails for a while delays the work and does not change its end."""
    operator = start_operator(alone.namespace)
    operator.wait_ready()
    operator.gate.faults = [429, 500, 503, 429, 500]
    alone.policy("chat")
    goal = expected(alone)
    eventually(lambda: "status" in (alone.get("kvp", "chat") or {}), "status")
    eventually(lambda: state(alone) == goal, "the same state")
    assert operator.gate.faults == []
    operator.end()


def test_a_refused_job_is_told(alone: Api, start_operator: StartOperator) -> None:
    """What the API server refuses is in the condition, and is tried again."""
    operator = start_operator(alone.namespace)
    operator.wait_ready()
    # the API server refuses a sixth object of what the quota counts
    quota = {"metadata": {"name": "q"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    alone.create("resourcequotas", quota)
    eventually(lambda: "status" in (alone.get("resourcequotas", "q") or {}), "quota")
    eventually(
        lambda: (alone.get("resourcequotas", "q") or {})["status"].get("used"), "quota in force"
    )
    alone.policy("chat")
    message = alone.wait_reason("chat", "Profiled", "WriteRefused")[1]
    assert "exceeded quota" in message
    alone.delete("resourcequotas", "q")
    alone.wait_reason("chat", "Profiled", "Profiling")
    operator.end()


@pytest.mark.slow
def test_one_of_two_leads(alone: Api, start_operator: StartOperator) -> None:
    """Of two operators one writes; when it ends in order, the other goes on within a few seconds."""
    first = start_operator(alone.namespace)
    first.wait_ready()
    eventually(lambda: alone.get("leases", "kvserve-operator"), "lease")
    second = start_operator(alone.namespace)
    second.wait_ready()
    alone.policy("chat")
    alone.wait_reason("chat", "Profiled", "Profiling")
    first.gate.settle(quiet_s=0.5)
    assert first.gate.writes
    assert second.gate.writes == []
    first.end()
    alone.policy("other")
    alone.wait_reason("other", "Profiled", "Profiling", timeout_s=8)
    assert second.gate.writes
    second.end()


@pytest.mark.slow
def test_a_stopped_leader_does_not_write_after_its_lease(
    alone: Api, start_operator: StartOperator
) -> None:
    """A leader that was stopped for longer than its lease writes nothing when it wakes; the other one leads."""
    first = start_operator(alone.namespace)
    first.wait_ready()
    alone.policy("chat")
    alone.wait_reason("chat", "Profiled", "Profiling")
    second = start_operator(alone.namespace)
    second.wait_ready()
    first.gate.settle(quiet_s=0.5)
    first.process.send_signal(signal.SIGSTOP)
    alone.policy("other")
    alone.wait_reason("other", "Profiled", "Profiling", timeout_s=25)
    first.gate.writes.clear()
    first.process.send_signal(signal.SIGCONT)
    alone.policy("third")
    alone.wait_reason("third", "Profiled", "Profiling")
    time.sleep(3)
    assert first.gate.writes == []
    first.end()
    second.end()


@pytest.mark.slow
def test_a_leader_that_is_cut_off_stops_and_comes_back(
    alone: Api, start_operator: StartOperator
) -> None:
    """Cut off from the API server, the leader is not ready, another leads, and it lives on as a follower."""
    first = start_operator(alone.namespace)
    first.wait_ready()
    second = start_operator(alone.namespace)
    second.wait_ready()
    first.gate.cut = True
    alone.policy("chat")
    alone.wait_reason("chat", "Profiled", "Profiling", timeout_s=30)
    assert second.gate.writes
    assert first.process.poll() is None
    first.gate.cut = False
    first.gate.writes.clear()
    alone.policy("other")
    alone.wait_reason("other", "Profiled", "Profiling")
    time.sleep(3)
    assert first.gate.writes == []
    first.end()
    second.end()
