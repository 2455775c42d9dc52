"""The KVServePolicy as values."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import PolicyError
from kvserve_api.policy import Control, Goal, Metric, Mode, Policy
from samples import policy_object

TTFT = {"name": "ttft", "metric": "TimeToFirstToken", "thresholdMilliseconds": 500}


def test_defaults() -> None:
    """A policy with model and targets only has the documented defaults."""
    value = policy_object()
    del value["spec"]["quality"]
    policy = Policy.from_object(value)
    default = policy.classes["default"]
    assert (policy.key, policy.generation) == ("default/chat", 1)
    assert (default.max_loss_bp, default.slo.goal, default.slo.objectives) == (
        100,
        Goal.MINIMIZE_LATENCY,
        (),
    )
    assert policy.control == Control(
        mode=Mode.ACTIVE,
        pinned=None,
        fallback="none",
        on_controller_loss="HoldLastGood",
        lease_s=60,
    )
    assert (policy.profiling.max_trials, policy.profiling.active_deadline_s) == (64, 7200)


def test_workload_class_inherits() -> None:
    """A workload class has the policy's SLO and budget where it sets none of its own."""
    policy = Policy.from_object(
        policy_object(
            slo={"objectives": [TTFT]},
            quality={"maxLossBasisPoints": 80},
            workloads=[
                {"name": "code", "quality": {"maxLossBasisPoints": 5}},
                {"name": "batch", "slo": {"goal": "MinimizeBytes"}},
            ],
        )
    )
    code, batch = policy.classes["code"], policy.classes["batch"]
    assert (code.max_loss_bp, code.slo) == (5, policy.classes["default"].slo)
    assert (batch.max_loss_bp, batch.slo.goal) == (80, Goal.MINIMIZE_BYTES)
    assert code.slo.objectives[0].metric is Metric.TIME_TO_FIRST_TOKEN
    assert code.slo.objectives[0].percentile == 95


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        pytest.param({"targets": []}, "spec.targets", id="no-targets"),
        pytest.param({"transport": "KVStore"}, "spec.transport", id="transport"),
        pytest.param({"model": {}}, "spec.model.name", id="no-model"),
        pytest.param({"modle": {}}, "spec.modle", id="typo"),
        pytest.param({"quality": {"maxLossBasisPoints": -1}}, "spec.quality.maxLoss", id="budget"),
        pytest.param({"quality": {"maxLossBasisPoints": 1.5}}, "spec.quality.maxLoss", id="float"),
        pytest.param({"control": {"mode": "Pinned"}}, "spec.control.pinnedProfile", id="no-pin"),
        pytest.param({"control": {"pinnedProfile": "x"}}, "spec.control.pinnedProfile", id="pin"),
        pytest.param(
            {"control": {"failsafe": {"leaseSeconds": 1}}}, "control.failsafe.lease", id="lease"
        ),
        pytest.param({"slo": {"objectives": [TTFT, TTFT]}}, "spec.slo.objectives", id="twice"),
        pytest.param(
            {"slo": {"objectives": [TTFT | {"percentile": 97}]}}, "percentile", id="percentile"
        ),
        pytest.param({"workloads": [{"name": "default"}]}, "workloads[0].name", id="class-default"),
        pytest.param({"workloads": [{"name": "Chat"}]}, "workloads[0].name", id="class-label"),
        pytest.param({"profiling": {"budget": {"maxTrials": 2}}}, "maxTrials", id="trials"),
    ],
)
def test_bad_policy_names_the_field(spec: dict[str, Any], field: str) -> None:
    """What can't be served is refused with the path of the field."""
    with pytest.raises(PolicyError) as caught:
        Policy.from_object(policy_object(**spec))
    assert field in caught.value.field


@pytest.mark.parametrize("value", [None, [], "text", {}, {"kind": "Pod"}])
def test_other_objects_are_refused(value: Any) -> None:
    """What is no KVServePolicy is refused as a whole."""
    with pytest.raises(PolicyError):
        Policy.from_object(value)


anything = st.none() | st.integers() | st.text(max_size=3)
sections = st.sampled_from(
    ["slo", "quality", "workloads", "profiling", "control", "model", "targets"]
)
keys = st.sampled_from(["mode", "goal", "name", "objectives", "budget", "failsafe", "role"])


@given(
    st.dictionaries(
        sections,
        anything
        | st.dictionaries(keys, anything, max_size=3)
        | st.lists(st.dictionaries(keys, anything), max_size=2),
        max_size=3,
    )
)
def test_any_spec_reads_or_is_a_policy_error(spec: dict[str, Any]) -> None:
    """No spec whatever leads to an error of another kind."""
    try:
        policy = Policy.from_object(policy_object(**spec))
    except PolicyError:
        return
    assert "default" in policy.classes


def test_target_matches_by_all_labels() -> None:
    """A pod belongs to a target if it has all its labels, whatever others it has."""
    target = Policy.from_object(policy_object()).targets[0]
    assert target.matches({"app": "chat-prefill", "other": "x"})
    assert not target.matches({"app": "chat-decode"})
    assert not target.matches({})
