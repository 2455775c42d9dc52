"""What the plan writes into the status: once, only its own part, and the right set."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from kvserve_api.names import child_name
from kvserve_api.policy import Policy
from kvserve_api.progress import Progress
from kvserve_api.run import RunInputs
from kvserve_operator.observed import Observed, RunFacts
from kvserve_operator.plan import Record, plan
from kvserve_operator.status import owned_status
from operator_samples import (
    CONFIG,
    CURRENT,
    NOW,
    OLD,
    brief,
    conditions,
    job,
    meta,
    observed,
    pareto,
    policy,
    status_of,
    with_status,
)

FAILED: dict[str, Any] = {"failed": True, "failure": ("BackoffLimitExceeded", "the limit")}


def test_what_was_written_is_not_written_again() -> None:
    """A plan of what an earlier plan wrote is empty, also later, and beside the controller's part of the status."""
    state = observed(jobs=(job(),), sets=(pareto(),))
    status = dict(status_of(plan(state, CONFIG)).status)
    theirs = {"type": "Programmed", "status": "False", "reason": "Waiting", "message": "no pods"}
    status["conditions"] = [theirs, *reversed(status["conditions"])]
    status["targets"] = [target | {"connected": 1} for target in reversed(status["targets"])]
    status["activeProfile"] = {"name": "int8"}
    settled = with_status(state, status)
    written = status_of(plan(settled, CONFIG)).status
    again = with_status(settled, {**status, **_merged(status, written)})
    later = dataclasses.replace(again, now=NOW + datetime.timedelta(hours=1))
    assert plan(later, CONFIG) == []


def _merged(status: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    theirs = [c for c in status["conditions"] if c["type"] == "Programmed"]
    targets = [t | {"connected": 1} for t in written["targets"]]
    return {**written, "conditions": [*written["conditions"], *theirs], "targets": targets}


def test_a_condition_keeps_its_time() -> None:
    """The transition time changes with the answer only, not with its reason."""
    state = observed(jobs=(job(),))
    settled = with_status(state, status_of(plan(state, CONFIG)).status)
    later = NOW + datetime.timedelta(minutes=5)
    changed = dataclasses.replace(settled, now=later, jobs=(job(**FAILED),), desired={})
    times = {
        c["type"]: c["lastTransitionTime"]
        for c in status_of(plan(changed, CONFIG)).status["conditions"]
    }
    assert times["Profiled"] == "2026-01-02T03:04:05Z"
    assert times["TargetsResolved"] == "2026-01-02T03:09:05Z"


def test_progress_alone_is_not_urgent() -> None:
    """A write that tells of progress only may wait; one that tells of anything else may not."""
    state = observed(jobs=(job(),))
    settled = with_status(state, status_of(plan(state, CONFIG)).status)
    run = RunFacts(meta=meta("run"), progress=Progress(completed=1, total=9))
    begun = dataclasses.replace(settled, runs=(run,))
    first = status_of(plan(begun, CONFIG))
    assert first.urgent
    run = RunFacts(meta=meta("run"), progress=Progress(completed=2, total=9, message="int8"))
    going = dataclasses.replace(with_status(begun, first.status), runs=(run,))
    second = status_of(plan(going, CONFIG))
    assert not second.urgent
    assert second.status["profiling"]["progress"] == "2/9"


def test_ready_is_the_sum() -> None:
    """Ready is True with all five, and else carries the reason of the first that is not."""
    state = observed(jobs=(job(),), sets=(pareto(),))
    assert conditions(plan(state, CONFIG))["Ready"] == ("False", "NotProgrammed")
    programmed = {"type": "Programmed", "status": "True", "reason": "x", "message": ""}
    done = with_status(state, {"conditions": [programmed]})
    assert conditions(plan(done, CONFIG))["Ready"] == ("True", "Serving")
    empty = dataclasses.replace(done, desired={"Prefill": 1, "Decode": 0})
    assert conditions(plan(empty, CONFIG))["Ready"] == ("False", "NoPods")
    anew = dataclasses.replace(done, sets=(pareto(OLD),))
    assert conditions(plan(anew, CONFIG))["Ready"] == ("True", "Serving")


def test_synced_counts_pods_there_are() -> None:
    """The column Synced sums both roles and never exceeds the pods that are selected."""
    targets = [{"role": "Prefill", "synced": 5}, {"role": "Decode", "synced": 1}]
    state = with_status(observed(), {"targets": targets})
    assert status_of(plan(state, CONFIG)).status["synced"] == "2/3"


def test_the_set_in_force() -> None:
    """In force is the current set, else the one before, else the youngest; none where an older policy wins."""
    young = "sha256:" + "1" * 64
    older = pareto(OLD)
    younger = pareto(young, meta=meta("pareto", young, created="2026-01-01T09:00:00Z"))

    def in_force(state: Observed) -> str:
        status = status_of(plan(state, CONFIG)).status
        name: str = status.get("pareto", {}).get("configMapRef", {}).get("name", "")
        return name

    both = observed(sets=(older, younger))
    assert in_force(both) == younger.meta.name
    before = {"pareto": {"configMapRef": {"name": older.meta.name}}}
    assert in_force(with_status(both, before)) == older.meta.name
    assert in_force(dataclasses.replace(both, sets=(older, younger, pareto()))) == (
        child_name("chat", "pareto", CURRENT)
    )
    assert (
        in_force(dataclasses.replace(both, sets=(dataclasses.replace(older, problem="x"),))) == ""
    )
    assert in_force(dataclasses.replace(both, winner="elder")) == ""


def test_two_sets_are_kept() -> None:
    """Of older sets the youngest stays beside the current one, and the one in force always."""
    digests = ["sha256:" + str(n) * 64 for n in range(4)]
    sets = tuple(
        pareto(d, meta=meta("pareto", d, created=f"2026-01-0{n + 1}T00:00:00Z"))
        for n, d in enumerate(digests)
    )
    gone = [w for w in brief(plan(observed(sets=(*sets, pareto())), CONFIG)) if "delete" in w]
    names = [child_name("chat", "pareto", d) for d in digests]
    assert gone == [f"delete ConfigMap {name}" for name in (names[2], names[1], names[0])]
    before = {"pareto": {"configMapRef": {"name": names[0]}}}
    kept = plan(with_status(observed(sets=sets), before), CONFIG)
    assert [w for w in brief(kept) if "delete" in w] == [
        f"delete ConfigMap {names[2]}",
        f"delete ConfigMap {names[1]}",
    ]


def test_budgets_of_classes() -> None:
    """Feasibility is judged for each class by its own budget, and the message names field and least loss."""
    facts = policy(
        quality={"maxLossBasisPoints": 10},
        workloads=[{"name": "code", "quality": {"maxLossBasisPoints": 4}}],
    )
    assert isinstance(facts.policy, Policy)
    inputs = RunInputs.of_policy(facts.policy, text_digests={}, image=CONFIG.image).digest
    actions = plan(observed(facts, sets=(pareto(inputs),)), CONFIG)
    assert conditions(actions)["QualityFeasible"] == ("False", "BudgetTooTight")
    status = status_of(actions).status
    message = next(c["message"] for c in status["conditions"] if c["type"] == "QualityFeasible")
    assert "class code: the least loss is 4.2 basis points, of profile int8" in message
    assert "spec.workloads[code].quality.maxLossBasisPoints to 5" in message
    assert "default" not in message


def test_events_tell_of_changes_once() -> None:
    """A change of an answer is an event; the same answer again is none."""
    state = observed(jobs=(job(**FAILED),))
    first = plan(state, CONFIG)
    told = [(a.reason, a.warning) for a in first if isinstance(a, Record)]
    assert told == [("JobFailed", True)]
    settled = with_status(state, status_of(first).status)
    more = dataclasses.replace(settled, desired={"Prefill": 9, "Decode": 9})
    assert [a for a in plan(more, CONFIG) if isinstance(a, Record)] == []


def test_owned_status_is_only_ours() -> None:
    """What the controller writes is not taken for the operator's."""
    theirs = {
        "conditions": [{"type": "Programmed", "status": "True"}, {"type": "ObjectivesMet"}],
        "targets": [{"role": "Decode", "synced": 1}],
        "activeProfile": {"name": "x"},
        "history": [],
    }
    assert owned_status(theirs) == {"conditions": []}
