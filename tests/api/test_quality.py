"""Budgets of quality: what a profile must have been shown to keep."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import PolicyError
from kvserve_api.policy import Policy
from kvserve_api.quality import QualityBudget, TaskScore
from kvserve_api.task_check import least_limit_bp
from samples import INT4, RAW, policy_object

Z95 = 1.6448536269514722
SCORE = TaskScore(items=64, exact=0.5, compressed=0.48, loss_upper_bp=500.0)
BUDGET = QualityBudget(max_loss_bp=100, tasks={"facts": 500})


@pytest.mark.parametrize(
    ("budget", "tasks", "admitted", "told"),
    [
        pytest.param(BUDGET, {"facts": SCORE}, True, "", id="kept"),
        pytest.param(BUDGET, {}, False, "none were measured", id="not-asked"),
        pytest.param(
            BUDGET,
            {"facts": replace(SCORE, loss_upper_bp=500.5)},
            False,
            "of task facts 500 basis points were allowed and 500 may be lost (64 items)",
            id="lost",
        ),
        pytest.param(replace(BUDGET, max_loss_bp=59), {"facts": SCORE}, False, "", id="divergence"),
        pytest.param(QualityBudget(max_loss_bp=60), {}, True, "", id="no-task"),
    ],
)
def test_all_of_a_budget_must_be_kept(
    budget: QualityBudget, tasks: dict[str, TaskScore], admitted: bool, told: str
) -> None:
    """A lossy profile needs a limit within the budget for the divergence and for each task."""
    profile = replace(INT4, tasks=tasks)
    assert budget.admits(profile) is admitted
    assert told in budget.told(profile)
    assert bool(budget.told(profile)) == bool(told)


def test_what_changes_nothing_needs_no_answers() -> None:
    """A lossless profile keeps every budget without having been asked."""
    assert QualityBudget(max_loss_bp=0, tasks={"facts": 0}).admits(RAW)


@given(st.integers(1, 10_000))
def test_the_least_limit_is_that_of_the_interval(items: int) -> None:
    """What the API server can compute in whole numbers is z² / (n + z²), rounded up."""
    exact = 10_000 * Z95**2 / (items + Z95**2)
    assert abs(least_limit_bp(items) - math.ceil(exact)) <= (abs(exact - round(exact)) < 0.01)


def test_classes_inherit_tasks() -> None:
    """A class has the policy's tasks unless it names its own, of which there may be none."""
    task = {"name": "facts", "builtIn": "Retrieval", "maxLossBasisPoints": 500}
    policy = Policy.from_object(
        policy_object(
            quality={"tasks": [task]},
            workloads=[
                {"name": "a", "quality": {"maxLossBasisPoints": 3}},
                {"name": "b", "quality": {"tasks": []}},
                {"name": "c", "quality": {"tasks": [task | {"maxLossBasisPoints": 600}]}},
            ],
        )
    )
    budgets = {name: dict(c.budget.tasks) for name, c in policy.classes.items()}
    assert budgets == {"default": {"facts": 500}, "a": {"facts": 500}, "b": {}, "c": {"facts": 600}}


def test_a_budget_that_can_not_be_shown_is_refused() -> None:
    """The error says what the items could show."""
    task = {"name": "a", "builtIn": "LastWord", "maxItems": 10, "maxLossBasisPoints": 1000}
    with pytest.raises(PolicyError, match=r"tasks\[0\].maxLossBasisPoints.* limit is 2130"):
        Policy.from_object(policy_object(quality={"tasks": [task]}))
