"""From a policy and a Pareto set to a table."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import ArtifactError, PolicyError
from kvserve_api.policy import Mode, Policy
from kvserve_api.profile_set import NONE, ParetoSet, Profile
from kvserve_api.quality import QualityBudget, TaskScore
from kvserve_api.table import MAX_CANDIDATES, DecisionTable, Version
from kvserve_controller.compile import Learned, compile_table, feasible, shortlist
from kvserve_controller.learn import Correction
from samples import INT4, INT8, RANS, RAW, pareto, policy_object, profile, strategy

VERSION = Version(epoch=3, counter=1)
TTFT = {"name": "ttft", "metric": "TimeToFirstToken", "thresholdMilliseconds": 500}
MOVE = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 400}

profiles = st.builds(
    profile,
    st.sampled_from([f"p{n}" for n in range(40)]),
    ratio=st.floats(1.01, 50),
    loss_bp=st.floats(0, 10_000),
    encode_bytes_per_s=st.floats(1e6, 1e11),
    decode_bytes_per_s=st.floats(1e6, 1e11),
)
pools = st.lists(profiles, max_size=40, unique_by=lambda p: p.name).map(lambda ps: [*ps, RAW])


def compiled(
    set_: ParetoSet | None = None, learned: Learned | None = None, **spec: Any
) -> DecisionTable:
    """Return the table of a policy over a set."""
    return compile_table(
        Policy.from_object(policy_object(**spec)),
        set_ or pareto(),
        version=VERSION,
        prior_bytes_per_s=125e6,
        learned=learned or Learned(corrections={}, model_s={}),
    )


def test_budget_decides_by_the_upper_limit() -> None:
    """A profile whose expected loss is within the budget but whose upper limit is not may not be used."""
    rules = compiled(quality={"maxLossBasisPoints": 50}).rules
    assert rules["default"].candidates == ("int8", "none")
    assert compiled(quality={"maxLossBasisPoints": 60}).rules["default"].candidates == (
        "int4",
        "int8",
        "none",
    )


def test_answers_are_a_hard_limit() -> None:
    """A lossy profile may be used only if it is known to keep the answers of each task of the class."""

    def answered(one: Profile, upper_bp: float) -> Profile:
        score = TaskScore(items=64, exact=0.9, compressed=0.9, loss_upper_bp=upper_bp)
        return replace(one, tasks={"facts": score})

    def task(limit_bp: int) -> dict[str, Any]:
        wish = {"name": "facts", "builtIn": "Retrieval", "maxLossBasisPoints": limit_bp}
        return {"maxLossBasisPoints": 100, "tasks": [wish]}

    measured = pareto(RANS, answered(INT4, 900.0), answered(INT8, 406.0), RAW)
    strict = compiled(
        measured,
        quality=task(500),
        workloads=[{"name": "chat", "quality": {"tasks": []}}, {"name": "code"}],
    ).rules
    assert strict["default"].candidates == ("int8", "none")
    assert strict["code"].candidates == ("int8", "none")
    assert strict["chat"].candidates == ("rans", "int4", "int8", "none")
    assert compiled(measured, quality=task(900)).rules["default"].candidates[0] == "int4"
    with pytest.raises(PolicyError, match="500 of task facts"):
        compiled(measured, quality=task(500), control={"failsafe": {"fallbackProfile": "int4"}})


def test_each_class_has_its_own_budget_and_profiles() -> None:
    """A class uses what was measured on its own text, within its own budget."""
    lossy = replace(INT8, loss_bp=30.0, loss_upper_bp=35.0)
    table = compiled(
        pareto(code=(INT4, lossy, RAW)),
        workloads=[
            {"name": "code", "quality": {"maxLossBasisPoints": 35}},
            {"name": "strict", "quality": {"maxLossBasisPoints": 0}},
        ],
    )
    assert table.rules["default"].candidates == ("rans", "int4", "int8", "none")
    assert table.rules["code"].candidates == ("int8", "none")
    assert table.rules["strict"].candidates == ("none",)
    assert table.candidates["int8"].loss_upper_bp == 35.0


@given(pools, st.integers(0, 10_000))
def test_quality_budget_is_never_exceeded(pool: list[Profile], budget: int) -> None:
    """Whatever was measured, every candidate of a class is within its budget, and raw is among at most eight."""
    table = compiled(pareto(*pool), quality={"maxLossBasisPoints": budget})
    names = table.rules["default"].candidates
    assert NONE in names
    assert len(names) <= MAX_CANDIDATES
    assert all(table.candidates[name].loss_upper_bp <= budget for name in names)
    assert len(names) == min(MAX_CANDIDATES, len(feasible(pool, QualityBudget(max_loss_bp=budget))))


@given(pools, st.randoms())
def test_equal_inputs_equal_table(pool: list[Profile], random: Any) -> None:
    """The order in which profiles were measured changes nothing."""
    turned = list(pool)
    random.shuffle(turned)
    assert shortlist(turned) == shortlist(pool)
    assert compiled(pareto(*turned)) == compiled(pareto(*pool))


@given(pools)
def test_shortlist_keeps_the_extremes(pool: list[Profile]) -> None:
    """However many profiles there are, the largest ratio stays a candidate."""
    names = shortlist(pool)
    assert max(pool, key=lambda p: p.ratio).ratio == max(p.ratio for p in pool if p.name in names)


def test_shortlist_spreads() -> None:
    """Of many profiles between two ratios the chosen ones cover the range, not one end of it."""
    pool = [profile(f"p{n:02}", ratio=1.5**n, loss_bp=n) for n in range(1, 31)]
    names = shortlist([*pool, RAW])
    steps = sorted(math.log(p.ratio, 1.5) for p in pool if p.name in names)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 8


@pytest.mark.parametrize(
    ("objectives", "model_s", "deadline_s"),
    [
        pytest.param([], {}, math.inf, id="none"),
        pytest.param([MOVE], {}, 0.4, id="transfer"),
        pytest.param([TTFT], {}, 0.25, id="first-token-unknown-model"),
        pytest.param([TTFT], {("default", 95): 0.4}, 0.1, id="first-token"),
        pytest.param([TTFT], {("default", 50): 0.4}, 0.25, id="other-percentile"),
        pytest.param([TTFT], {("default", 95): 0.7}, 0.025, id="model-alone-is-too-slow"),
        pytest.param([TTFT, MOVE], {("default", 95): 0.05}, 0.4, id="tightest"),
    ],
)
def test_deadline(
    objectives: list[Any], model_s: dict[tuple[str, int], float], deadline_s: float
) -> None:
    """A transfer may take what the objectives leave it, conservatively where nothing was observed."""
    table = compiled(
        slo={"objectives": objectives}, learned=Learned(corrections={}, model_s=model_s)
    )
    assert table.rules["default"].deadline_s == pytest.approx(deadline_s)


def test_corrections_enter_the_costs() -> None:
    """Slower codecs and larger payloads than profiled are what pods reckon with."""
    learned = Learned(
        corrections={"int4": Correction(encode=2.0, decode=0.5, wire=1.2)}, model_s={}
    )
    plain, corrected = compiled().candidates["int4"], compiled(learned=learned).candidates["int4"]
    assert corrected.encode.seconds(1e9) == pytest.approx(2 * plain.encode.seconds(1e9))
    assert corrected.decode.seconds(1e9) == pytest.approx(0.5 * plain.decode.seconds(1e9))
    assert corrected.ratio == pytest.approx(plain.ratio / 1.2)
    assert compiled(learned=learned).candidates["int8"] == compiled().candidates["int8"]


def test_control_is_carried_over() -> None:
    """Mode, pin, fallback, lease and what happens on loss come from the policy."""
    table = compiled(
        control={
            "mode": "Pinned",
            "pinnedProfile": "rans",
            "failsafe": {
                "fallbackProfile": "int8",
                "onControllerLoss": "Revert",
                "leaseSeconds": 30,
            },
        }
    )
    assert (table.mode, table.pinned, table.fallback, table.ttl_s, table.on_controller_loss) == (
        Mode.PINNED,
        "rans",
        "int8",
        30.0,
        "Revert",
    )
    assert (table.version, table.policy) == (VERSION, "default/chat")


def test_pin_may_exceed_the_budget_fallback_may_not() -> None:
    """Who pins means it; a fallback that nobody would ask for must keep the budget."""
    quality = {"maxLossBasisPoints": 10}
    pinned = compiled(quality=quality, control={"mode": "Pinned", "pinnedProfile": "rans"})
    assert pinned.pinned == "rans"
    assert "rans" not in pinned.rules["default"].candidates
    with pytest.raises(PolicyError, match=r"'rans' exceeds .* within it: int8, none"):
        compiled(quality=quality, control={"failsafe": {"fallbackProfile": "rans"}})


@pytest.mark.parametrize(
    ("control", "field"),
    [
        ({"mode": "Pinned", "pinnedProfile": "int5"}, "spec.control.pinnedProfile"),
        ({"failsafe": {"fallbackProfile": "int5"}}, "spec.control.failsafe.fallbackProfile"),
    ],
)
def test_unknown_profile_names_the_known_ones(control: dict[str, Any], field: str) -> None:
    """A profile that was not measured is an error that lists those that were."""
    with pytest.raises(PolicyError, match="known: int4, int8, none, rans") as caught:
        compiled(control=control)
    assert caught.value.field == field


def test_set_of_another_model_is_refused() -> None:
    """Profiles of another model, or another revision of it, say nothing about this one."""
    with pytest.raises(ArtifactError, match="profile that one"):
        compiled(pareto(model="other/model"))
    with pytest.raises(ArtifactError, match="test/model@2"):
        compiled(model={"name": "test/model", "revision": "2"})


def test_one_name_is_one_strategy() -> None:
    """Classes that give one name to two strategies can't share a table."""
    other = replace(INT8, strategy=strategy("other"))
    with pytest.raises(ArtifactError, match="another strategy 'int8'"):
        compiled(pareto(RANS, INT8, RAW, code=(other, RAW)), workloads=[{"name": "code"}])
