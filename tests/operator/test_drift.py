"""When drift starts a profiling run: once in an interval, more seldom while it does not help, never in a loop."""

import dataclasses
import datetime
from typing import Any

import pytest

import samples
from kube_api import Api, eventually
from kvserve_api.names import child_name
from kvserve_api.run import RunInputs
from kvserve_operator.drift import Runs, judge
from kvserve_operator.observed import Observed
from kvserve_operator.plan import Action, ApplyStatus, LookAgain, Record, plan
from operator_samples import (
    CONFIG,
    CURRENT,
    JOB,
    brief,
    conditions,
    job,
    observed,
    pareto,
    policy,
    status_of,
    with_status,
)

DAY_S = 86_400
WHY = "int4: encode takes 2.4 times what was profiled"


def moment(after_s: float) -> datetime.datetime:
    """Return a time so many seconds after the set of the samples was made."""
    return datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=after_s)


def drifted(since_s: float, **parts: Any) -> dict[str, Any]:
    """Return a status with the controller's word that transfers drifted."""
    condition = {
        "type": "ProfilesAccurate",
        "status": "False",
        "reason": "Drifted",
        "message": f"{WHY}; costs are corrected, but what was not tried may be misjudged",
        "lastTransitionTime": moment(since_s).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {"conditions": [condition | parts]}


def state(now_s: float, status: dict[str, Any], **on_drift: Any) -> Observed:
    """Return a served policy at some time after its set was made."""
    facts = policy(profiling={"onDrift": on_drift})
    seen = dataclasses.replace(
        observed(facts, jobs=(job(complete=True),), sets=(pareto(),)), now=moment(now_s)
    )
    return with_status(seen, status)


def events(actions: list[Action]) -> list[str]:
    """Return the messages of events about drift."""
    return [a.message for a in actions if isinstance(a, Record) and a.reason == "DriftReprofiling"]


def test_drift_starts_another_run() -> None:
    """After the interval a new run measures under another name, an event says why, and the set keeps serving."""
    actions = plan(state(DAY_S + 1, drifted(3600)), CONFIG)
    applied = [word for word in brief(actions) if word.startswith("apply Job")]
    assert len(applied) == 1
    assert applied != [f"apply Job {JOB}"]
    (message,) = events(actions)
    assert WHY in message
    assert conditions(actions)["Profiled"] == ("True", "Reprofiling")
    status = status_of(actions).status
    assert status["drift"] == {
        "runs": 1, "runsInARow": 1, "message": WHY,
        "inputsDigest": status["profiling"]["inputsDigest"],
    }  # fmt: skip
    assert status["pareto"]["configMapRef"]["name"] == child_name("chat", "pareto", CURRENT)
    told = next(c["message"] for c in status["conditions"] if c["type"] == "Profiled")
    assert WHY in told


@pytest.mark.parametrize(
    ("now_s", "status", "on_drift"),
    [
        pytest.param(DAY_S - 1, drifted(3600), {}, id="too-early"),
        pytest.param(DAY_S + 1, drifted(3600), {"reprofile": False}, id="switched-off"),
        pytest.param(DAY_S + 1, drifted(-60), {}, id="drift-of-the-set-before"),
        pytest.param(DAY_S + 1, drifted(60, status="True", reason="Accurate"), {}, id="accurate"),
        pytest.param(DAY_S + 1, drifted(60, status="Unknown"), {}, id="no-traffic"),
        pytest.param(DAY_S + 1, drifted(60, lastTransitionTime="now"), {}, id="no-time"),
        pytest.param(DAY_S + 1, {}, {}, id="no-controller"),
    ],
)
def test_no_run(now_s: float, status: dict[str, Any], on_drift: dict[str, Any]) -> None:
    """Nothing starts before it is time, without drift of this very set, or against the policy's wish."""
    actions = plan(state(now_s, status, **on_drift), CONFIG)
    assert brief(actions) == []
    assert events(actions) == []
    assert "drift" not in status_of(actions).status


def test_waiting_is_told_and_ends() -> None:
    """While it is too early the condition says until when, and the operator looks again then."""
    actions = plan(state(100, drifted(50), minIntervalSeconds=600), CONFIG)
    assert [a.after_s for a in actions if isinstance(a, LookAgain)] == [500.0]
    told = next(c for c in status_of(actions).status["conditions"] if c["type"] == "Profiled")
    assert told["message"].endswith("profiled again not before 2026-01-01T00:10:00Z")


def test_a_running_measurement_is_not_restarted() -> None:
    """What drift started is planned again, unchanged, until it ends; its name follows from the status."""
    first = plan(state(DAY_S + 1, drifted(3600)), CONFIG)
    status = {**status_of(first).status}
    status["conditions"] = [*status["conditions"], *drifted(3600)["conditions"]]
    again = plan(state(DAY_S + 2, status), CONFIG)
    assert [w for w in brief(again) if w.startswith("apply")] == [
        w for w in brief(first) if w.startswith("apply")
    ]
    assert events(again) == []
    assert not any(isinstance(a, ApplyStatus) for a in again)


def test_what_was_started_is_remembered_while_the_policy_is_refused() -> None:
    """A conflict or a missing text does not make the operator forget which set is in force."""
    runs = Runs(total=2, in_a_row=2, inputs_digest=CURRENT, message=WHY)
    seen = dataclasses.replace(state(10, {"drift": runs.to_json()}), winner="elder")
    assert status_of(plan(seen, CONFIG)).status["drift"] == runs.to_json()


@pytest.mark.parametrize(
    ("in_a_row", "since_s", "now_s", "starts"),
    [
        pytest.param(1, 60, 2 * DAY_S - 1, 0, id="waits-twice-as-long"),
        pytest.param(1, 60, 2 * DAY_S, 2, id="again"),
        pytest.param(5, 60, 32 * DAY_S, 6, id="sixth"),
        pytest.param(9, 60, 64 * DAY_S - 1, 0, id="waits-at-most"),
        pytest.param(9, 60, 64 * DAY_S, 10, id="64-times"),
        pytest.param(3, 9 * DAY_S, 9 * DAY_S + 5, 1, id="had-held"),
        pytest.param(0, 9 * DAY_S, 9 * DAY_S + 5, 1, id="first"),
    ],
)
def test_drift_that_persists_backs_off(
    in_a_row: int, since_s: float, now_s: float, starts: int
) -> None:
    """Each run that does not help doubles the wait; a set that held for the whole wait begins anew."""
    runs = Runs(total=9, in_a_row=in_a_row, inputs_digest=CURRENT)
    assert judge(state(now_s, drifted(since_s)), pareto(), runs).in_a_row == starts


def test_an_edit_forgets_the_row() -> None:
    """A set of other inputs than the last drift run's waits one interval only."""
    runs = Runs(total=9, in_a_row=5, inputs_digest="sha256:" + "1" * 64)
    assert judge(state(DAY_S, drifted(60)), pareto(), runs).in_a_row == 1


def test_drift_is_followed_on_a_real_api_server(shared: Api) -> None:
    """The controller's condition starts one run after the interval, and none for drift from the earlier set."""
    shared.policy("drifts", profiling={"onDrift": {"minIntervalSeconds": 5}})
    first = shared.wait_job("drifts")
    shared.write_set(first, samples.pareto())
    shared.end_pod(first["metadata"]["name"], code=0)
    shared.wait_reason("drifts", "Profiled", "Profiled")
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    since = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    shared.apply_status("drifts", drifted(0, lastTransitionTime=since))
    second = shared.wait_job("drifts", other_than=first["metadata"]["name"])
    run = second["metadata"]["name"].replace("-job-", "-run-")
    inputs = (shared.get("configmaps", run) or {})["data"]["inputs.json"]
    assert RunInputs.parse(inputs.encode()).drift_runs == 1
    assert shared.wait_reason("drifts", "Profiled", "Reprofiling")[0] == "True"

    def told() -> bool:
        found = [e for e in shared.find("events") if e["involvedObject"].get("name") == "drifts"]
        return any(e["reason"] == "DriftReprofiling" and WHY in e["message"] for e in found)

    eventually(told, "event")
    shared.write_set(second, samples.pareto(samples.INT8, samples.RAW))
    shared.end_pod(second["metadata"]["name"], code=0)
    shared.wait_reason("drifts", "Profiled", "Profiled")
    status = (shared.get("kvp", "drifts") or {})["status"]
    assert (status["drift"]["runs"], status["drift"]["runsInARow"]) == (1, 1)
    assert len(shared.find("jobs", "kvserve.io/policy=drifts")) == 1
