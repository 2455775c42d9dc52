"""The pure parts of ``make bench-pd``: arrivals, the plan, what a run amounts to, and the model of GPUs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import pd_claims
import pd_model
import pd_plan
from kvserve_api.latency import StageCost
from pd_load import LENGTHS, WEIGHTS, Timing, course, mean_tokens, schedule
from pd_plan import (
    ALONE,
    KVSERVE,
    KVSERVE_QUALITY,
    MOVING,
    ONE_BY_ONE,
    PAPERS_REGIME,
    RAW,
    Condition,
    Moves,
    Speeds,
)
from pd_servers import read_totals

SPEEDS = Speeds(prefill_s_per_token=1e-3, job_s=1.5, request_s=0.05, mean_tokens=mean_tokens())
CONDITION = Condition(name=MOVING, mbit=20.0, requests=3, per_s=1.0, policies=(RAW,), moving=True)


def cell(
    timings: Sequence[Timing], bytes_wire: int = 1, grown: Mapping[str, float] | None = None
) -> pd_claims.Cell:
    """Return what a policy got."""
    return pd_claims.Cell(timings=tuple(timings), bytes_wire=bytes_wire, grown=grown or {})


def row(policy: str, *jct_s: float, name: str = MOVING, **changes: Any) -> pd_claims.Row:
    """Return the row of a policy whose requests took so long."""
    timings = [Timing(at_s=0.0, tokens=500, prefill_s=0.5, ttft_s=s - 0.1, jct_s=s) for s in jct_s]
    made = pd_claims.row(
        replace(CONDITION, name=name), policy, cell(timings), losses_bp={}, objective_s=1.0
    )
    return made | changes


def test_arrivals_are_poisson_and_repeatable() -> None:
    """The same arguments give the same course; its rate is the wanted one and its gaps vary as a Poisson process's."""
    made = course(4000, 2.0, seed=7)
    assert made == course(4000, 2.0, seed=7) != course(4000, 2.0, seed=8)
    gaps = [b - a for (a, _), (b, _) in pairwise(made)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.05)


def test_each_length_is_as_frequent_as_its_weight() -> None:
    """Of ten requests each length has its weight's share exactly."""
    lengths = [tokens for _, tokens in course(10, 1.0, seed=1)]
    assert [lengths.count(length) for length in LENGTHS] == list(WEIGHTS)


def test_prompts_are_pieces_of_texts() -> None:
    """A prompt is a run of tokens of one document, and as long as the course says."""
    documents = [list(range(5000)), list(range(10_000, 12_100))]
    for request, (at_s, tokens) in zip(
        schedule(documents, 20, 1.0, 3), course(20, 1.0, 3), strict=True
    ):
        assert (request.at_s, len(request.prompt)) == (at_s, tokens)
        first = request.prompt[0]
        assert request.prompt == tuple(range(first, first + tokens))


def test_short_texts_are_repeated() -> None:
    """Where no document is long enough, all of them together are repeated."""
    (request, *_) = schedule([[1, 2, 3], [4, 5]], 5, 1.0, 3)
    assert set(request.prompt) == {1, 2, 3, 4, 5}
    assert len(request.prompt) in LENGTHS


def test_the_papers_regime_follows_from_prefill() -> None:
    """At its rate a raw transfer takes ten times its prefill."""
    tokens = 1000
    raw_s = tokens * pd_plan.BITS_A_TOKEN / (SPEEDS.regime_mbit * 1e6)
    assert raw_s == pytest.approx(10 * tokens * SPEEDS.prefill_s_per_token)


@pytest.mark.parametrize(("minutes", "quick"), [(2, True), (14, False), (25, False)])
def test_the_plan_fits_its_time(minutes: int, *, quick: bool) -> None:
    """Twice the minutes mean more requests; the estimate stays within them, or the requests are the fewest."""
    budget_s = 60.0 * minutes
    conditions = pd_plan.plan(SPEEDS, budget_s=budget_s, quick=quick)
    fewest = min(c.requests for c in conditions) == pd_plan.LEAST
    assert pd_plan.estimated_s(conditions, SPEEDS) <= budget_s or fewest
    more = pd_plan.plan(SPEEDS, budget_s=2 * budget_s, quick=quick)
    assert sum(c.requests for c in more) > sum(c.requests for c in conditions) or fewest


def test_a_moving_link_has_its_rates_in_turn() -> None:
    """It begins with the first one, keeps each as long, and begins anew."""
    moves = Moves(rates_mbit=(20.0, 100.0, None), phase_s=8.0)
    at_s = (0.0, 7.9, 8.0, 16.0, 23.9, 24.0)
    assert [moves.mbit(each) for each in at_s] == [20.0, 20.0, 100.0, None, None, 20.0]


def test_counters_are_read_from_the_metrics_page() -> None:
    """Labels besides engine and model make the key; other metrics are left out."""
    page = "\n".join(
        [
            "# TYPE vllm:kvserve_wire_bytes_total counter",
            'vllm:kvserve_wire_bytes_total{direction="receive",engine="0",model_name="m",profile="joint-3"} 12.0',
            'vllm:kvserve_wire_bytes_total{direction="receive",engine="1",model_name="m",profile="joint-3"} 30.0',
            'vllm:kvserve_transfer_failures_total{direction="receive",engine="0",model_name="m",reason="Timeout"} 1.0',
            'vllm:prompt_tokens_total{engine="0"} 7.0',
        ]
    )
    assert read_totals(page) == {
        "wire_bytes{receive,joint-3}": 42.0,
        "transfer_failures{receive,Timeout}": 1.0,
    }


def test_a_row_says_what_was_used_and_lost() -> None:
    """Loss is the mean over transfers, failures and errors are counted, and failed requests give no times."""
    timings = [
        Timing(at_s=0.0, tokens=500, prefill_s=1.0, ttft_s=1.5, jct_s=2.0),
        Timing(at_s=1.0, tokens=500, prefill_s=1.0, ttft_s=4.0, jct_s=5.0),
        Timing(at_s=2.0, tokens=500, error="ReadTimeout"),
        Timing(at_s=2.0, tokens=500, prefill_s=1.0, ttft_s=1.5, jct_s=3.0),
    ]
    found = pd_claims.row(
        CONDITION,
        KVSERVE,
        cell(
            timings,
            grown={
                "transfers{receive,joint-3}": 1.0,
                "transfers{receive,none}": 3.0,
                "transfers{send,none}": 9.0,
                "transfer_failures{receive,Timeout}": 2.0,
            },
        ),
        losses_bp={"joint-3": 40.0, "none": 0.0},
        objective_s=1.0,
    )
    assert found["profiles"] == {"joint-3": 1, "none": 3}
    assert found["loss_bp"] == 10.0
    assert (found["errors"], found["recomputed"], found["requests"]) == (1, 2, 4)
    assert found["attained"] == 0.5
    assert found["jct_s"]["p50"] == 3.0
    assert found["jct_s"]["mean"] == pytest.approx(10 / 3)
    assert found["jct_each_s"] == [2.0, 5.0, None, 3.0]


def test_the_best_fixed_profile_is_chosen_in_hindsight_within_the_budget() -> None:
    """Neither a profile beyond the budget, nor one with errors, nor KVServe itself can be it."""
    rows = [
        row(RAW, 9.0),
        row("joint-3", 4.0),
        row("cachegen", 1.0),
        row("joint-10", 1.0, errors=1),
        row(KVSERVE, 2.0),
        row(KVSERVE_QUALITY, 1.0),
        row(ALONE, 0.5),
    ]
    assert pd_claims.vs_best_static(rows, ["cachegen"]) == {
        MOVING: {"static": "joint-3", "times": 0.5}
    }
    assert pd_claims.vs_raw(rows)[MOVING][KVSERVE] == 4.5


@pytest.mark.parametrize(
    ("fixed", "ours", "times"),
    [
        pytest.param([("a", 0.9, 40.0), ("b", 0.9, 30.0)], (0.9, 10.0), 3.0, id="least-lossy"),
        pytest.param([("a", 0.8, 1.0), ("b", 0.9, 30.0)], (0.9, 10.0), 3.0, id="equal-attainment"),
        pytest.param([("a", 0.8, 1.0)], (0.9, 10.0), math.inf, id="none-attains"),
        pytest.param([(RAW, 0.9, 0.0)], (0.9, 10.0), 0.0, id="raw-attains"),
        pytest.param([(RAW, 0.9, 0.0)], (0.9, 0.0), 1.0, id="both-raw"),
    ],
)
def test_less_loss_is_counted_at_equal_attainment(
    fixed: list[tuple[str, float, float]], ours: tuple[float, float], times: float
) -> None:
    """Only fixed profiles that keep the objective at least as often count."""
    group = {name: row(name, 1.0, attained=kept, loss_bp=loss) for name, kept, loss in fixed}
    group[KVSERVE_QUALITY] = row(KVSERVE_QUALITY, 1.0, attained=ours[0], loss_bp=ours[1])
    assert pd_claims.less_loss(group) == times


def test_claims_hold_or_fail_by_what_was_measured() -> None:
    """Each claim takes its own condition's rows."""
    rows = [
        row(RAW, 30.0, name=PAPERS_REGIME),
        row(KVSERVE, 3.0, name=PAPERS_REGIME),
        row(RAW, 9.0),
        row("joint-3", 2.0),
        row(KVSERVE, 2.1),
        row(ALONE, 1.0, 2.0, name=ONE_BY_ONE),
        row(RAW, 1.04, 2.08, name=ONE_BY_ONE),
        row(KVSERVE, 1.04, 2.08, name=ONE_BY_ONE),
    ]
    found = pd_claims.claims(rows, [], request_s=0.05)
    assert [(round(one["value"], 3), one["holds"]) for one in found] == [
        (10.0, True),
        (1.05, False),
        (1.0, True),
        (1.04, True),
    ]


def test_parts_of_a_cell_add_up() -> None:
    """Requests follow each other, bytes and counters are sums."""
    first, second = (Timing(at_s=at_s, tokens=500, jct_s=1.0) for at_s in (0.0, 1.0))
    both = cell([first], 3, {"a": 1.0, "b": 2.0}) + cell([second], 4, {"b": 5.0, "c": 6.0})
    assert (both.timings, both.bytes_wire) == ((first, second), 7)
    assert dict(both.grown) == {"a": 1.0, "b": 7.0, "c": 6.0}


@pytest.mark.parametrize("requests", [1, 3, 16, 17])
def test_turns_are_all_requests(requests: int) -> None:
    """Each request is in one turn, and none is empty."""
    turns = replace(CONDITION, requests=requests, rounds=4).turns()
    assert [i for turn in turns for i in range(requests)[turn]] == list(range(requests))
    assert min(turn.stop - turn.start for turn in turns) >= 1
    assert len(turns) == min(4, requests)


def test_overlap_counts_from_the_prefills_end() -> None:
    """What comes between a prefill's end and the first token, less the request itself, is hidden or not."""
    late = row("late", 2.1, 2.1, 2.1, prefill_each_s=[0.95, 0.95, None], name=pd_plan.OVERLAP)
    early = row("early", 1.6, 1.5, 1.4, prefill_each_s=[1.2, 1.3, 1.0], name=pd_plan.OVERLAP)
    late["policy"] += pd_plan.LATE
    found = pd_claims.overlap([late, early], request_s=0.05)
    # 1 s is to be hidden; of it .25 and .05 s are left, and the third request failed once
    assert found == pytest.approx(
        {
            "hidden": (0.75 + 0.95) / 2,
            "prefill_times": 1.25 / 0.95,
            "ttft_times": (1.5 / 2 + 1.4 / 2) / 2,
        }
    )
    assert pd_claims.overlap([late], request_s=0.05) is None


def test_the_model_gives_a_lone_request_its_own_times() -> None:
    """Without a queue it is prefill, the pipeline of the transfer, and generation."""
    codec = pd_model.Codec(
        ratio=2.0, encode=StageCost(bytes_per_s=1e6), decode=StageCost(bytes_per_s=2e6)
    )
    (jct_s,) = pd_model.simulate(
        [(3.0, 1000)],
        [codec],
        token_bytes=1000.0,
        prefill_s_per_token=1e-3,
        generate_s=0.5,
        bytes_per_s=1e5,
    )
    # a million bytes: 1 s, 5 s and 0.5 s in six chunks each
    assert jct_s == pytest.approx(1.0 + (1.0 + 5.0 + 0.5 + 5 * 5.0) / 6 + 0.5)


def test_the_model_queues() -> None:
    """Requests that come at once wait for each other's prefill and for the link, and the better codec is chosen."""
    raw = pd_model.Codec(ratio=1.0, encode=StageCost(), decode=StageCost())
    small = replace(raw, ratio=10.0)
    arrivals = [(0.0, 1000)] * 3
    how: dict[str, Any] = {
        "token_bytes": 1000.0,
        "prefill_s_per_token": 1e-3,
        "generate_s": 0.0,
        "bytes_per_s": 1e5,
    }
    assert pd_model.simulate(arrivals, [raw], **how) == pytest.approx([11.0, 21.0, 31.0])
    assert pd_model.simulate(arrivals, [raw, small], **how) == pytest.approx([2.0, 3.0, 4.0])
