"""Who may have a pod."""

from typing import Any

import pytest

import samples
from kvserve_api.policy import Policy
from kvserve_operator.conflicts import self_overlap, winner
from kvserve_operator.observed import PolicyFacts


def facts(name: str, created: str, prefill: dict[str, str], **changes: Any) -> PolicyFacts:
    """Return a policy whose prefill pods have these labels; its decode pods are its own."""
    targets = [
        {"role": "Prefill", "selector": {"matchLabels": prefill}},
        {"role": "Decode", "selector": {"matchLabels": {"decode": name}}},
    ]
    value = samples.policy_object(name, targets=targets)
    value["metadata"] |= {"uid": name, "creationTimestamp": created} | changes
    return PolicyFacts.read(value)


OLD = facts("old", "2026-01-01", {"app": "a"})
MIDDLE = facts("middle", "2026-01-02", {"app": "a", "tier": "x"})
YOUNG = facts("young", "2026-01-03", {"tier": "x"})
APART = facts("apart", "2026-01-01", {"app": "b"})
POD = {"app": "b", "tier": "x"}


@pytest.mark.parametrize(
    ("one", "rivals", "pods", "name"),
    [
        pytest.param(MIDDLE, [OLD, MIDDLE], [], "old", id="narrower-selector"),
        pytest.param(OLD, [OLD, MIDDLE], [], "", id="the-older-one"),
        pytest.param(YOUNG, [MIDDLE, YOUNG], [], "middle", id="wider-selector"),
        pytest.param(YOUNG, [OLD, MIDDLE, YOUNG], [], "", id="a-loser-takes-nothing"),
        pytest.param(YOUNG, [APART, YOUNG], [], "", id="no-common-pod"),
        pytest.param(YOUNG, [APART, YOUNG], [POD], "apart", id="a-common-pod"),
        pytest.param(
            MIDDLE,
            [facts("old", "2026-01-01", {"app": "a"}, deletionTimestamp="2026-01-04"), MIDDLE],
            [],
            "",
            id="on-its-way-out",
        ),
        pytest.param(
            facts("b", "2026-01-01", {"app": "a"}),
            [OLD, facts("a", "2026-01-01", {"app": "a"})],
            [],
            "a",
            id="same-second",
        ),
    ],
)
def test_winner(
    one: PolicyFacts, rivals: list[PolicyFacts], pods: list[dict[str, str]], name: str
) -> None:
    """The older of two policies wins, unless it lost itself; no order of the list changes that."""
    assert winner(one, rivals, pods) == name
    assert winner(one, rivals[::-1], pods) == name


def test_self_overlap() -> None:
    """Selectors of one policy must not imply each other."""
    both = [
        {"role": "Prefill", "selector": {"matchLabels": {"a": "1"}}},
        {"role": "Decode", "selector": {"matchLabels": {"a": "1", "b": "2"}}},
    ]
    assert self_overlap(Policy.from_object(samples.policy_object(targets=both)))
    assert not self_overlap(Policy.from_object(samples.policy_object()))
