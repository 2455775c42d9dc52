"""The pure parts of ``make bench-pd``: arrivals, the plan, what a run amounts to, and the model of GPUs."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import pd_claims
import pd_model
import pd_plan
import pd_rows
from kvserve_api.latency import StageCost
from pd_load import LENGTHS, WEIGHTS, Timing, course, schedule
from pd_plan import (
    ALONE,
    KVSERVE,
    KVSERVE_QUALITY,
    MOVING,
    ONE_BY_ONE,
    OVERLAP,
    PAPERS_REGIME,
    RAW,
    Condition,
    Moves,
)
from pd_servers import read_totals

CONDITION = Condition(name=MOVING, mbit=20.0, requests=3, policies=(RAW,), moving=True)
TURN = pd_rows.Turn(timings=(), bytes_wire=1, grown={}, per_s=1.0, prefill_s_per_token=1e-3)


def row(
    policy: str, *jct_s: float, name: str = MOVING, rounds: int = 1, **changes: Any
) -> pd_rows.Row:
    """Return the row of a policy whose requests took so long, in rounds of as many each."""
    timings = [Timing(at_s=0.0, tokens=500, prefill_s=0.5, ttft_s=s - 0.1, jct_s=s) for s in jct_s]
    size = len(timings) // rounds
    turns = [
        replace(TURN, timings=tuple(timings[i * size : (i + 1) * size])) for i in range(rounds)
    ]
    condition = replace(CONDITION, name=name, moving=name == MOVING)
    made = pd_rows.row(condition, policy, turns, mbit=20.0, losses_bp={}, objective_s=1.0)
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


def test_link_and_load_follow_from_prefill() -> None:
    """In the regime a raw transfer takes so many times its prefill, and arrivals keep the engine as busy as said."""
    prefill_s, tokens = 0.7e-3, 900
    condition = replace(CONDITION, mbit=None, regime=12.0, load=0.3)
    mbit = condition.link_mbit(prefill_s)
    assert mbit is not None
    raw_s = tokens * pd_plan.BITS_A_TOKEN / (mbit * 1e6)
    assert raw_s == pytest.approx(12 * tokens * prefill_s)
    assert condition.per_s(prefill_s, tokens) * tokens * prefill_s == pytest.approx(0.3)
    assert replace(condition, regime=0.0, mbit=50.0).link_mbit(prefill_s) == 50.0


@pytest.mark.parametrize(
    ("prefill_s", "requests"), [(0.5e-3, 12), (1e-3, 8), (2e-3, 4), (1e-1, pd_plan.LEAST)]
)
def test_a_round_lasts_no_longer_than_it_may(prefill_s: float, requests: int) -> None:
    """A slower machine has fewer requests in a round instead of a longer one, but some."""
    condition = replace(CONDITION, requests=12, load=0.3, lasts_s=24.0)
    assert condition.count(prefill_s, 900.0) == requests
    assert replace(condition, lasts_s=0.0).count(prefill_s, 900.0) == 12


def test_requests_arrive_over_all_of_a_course() -> None:
    """A round that lasts as long as a course ends a mean gap after its last request; others go by the rate alone."""
    at_s = [0.0, 1.0, 5.0]
    course_s = replace(CONDITION, load=0.3, lasts_s=24.0).arrivals_s(at_s, 0.5)
    assert course_s == [0.0, 4.0, 20.0]
    assert replace(CONDITION, load=0.3).arrivals_s(at_s, 0.5) == [0.0, 2.0, 10.0]
    assert CONDITION.arrivals_s(at_s, 0.0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("minutes", [6.0, 14.0, 25.0])
def test_the_time_decides_how_much_is_compared_but_not_what(minutes: float) -> None:
    """Links and policies are the same whatever the time, rounds have fewer requests, and all ends in time."""
    full = pd_plan.plan(60.0, quick=False)
    made = pd_plan.plan(minutes, quick=False)
    assert [(c.name, c.policies) for c in made] == [(c.name, c.policies) for c in full]
    assert all(pd_plan.LEAST <= a.requests <= b.requests for a, b in zip(made, full, strict=True))
    ends = [c.ends for c in made if c.rounds > 1]
    assert ends == sorted(ends)
    assert ends[-1] == 1.0


def test_policies_take_turns_at_being_first() -> None:
    """Each begins a round as often as the others, but those that run seldom end the first three rounds."""
    condition = replace(CONDITION, policies=("a", "b", RAW), seldom=(RAW,))
    assert [condition.order(n) for n in range(5)] == [
        ("a", "b", RAW),
        ("b", "a", RAW),
        ("a", "b", RAW),
        ("b", "a"),
        ("a", "b"),
    ]


@pytest.mark.parametrize(
    ("done", "left_s", "begins"),
    [
        pytest.param(0, -9.0, True, id="the-first-always"),
        pytest.param(1, 65.0, True, id="it-fits"),
        pytest.param(1, 64.9, False, id="it-does-not-fit"),
        pytest.param(3, 5.0, True, id="it-fits-without-the-seldom"),
        pytest.param(3, 4.9, False, id="it-does-not-fit-without-them"),
        pytest.param(4, 99.0, False, id="no-more-wanted"),
    ],
)
def test_rounds_begin_while_they_fit(done: int, left_s: float, *, begins: bool) -> None:
    """A further round takes what its policies took last, and only those that have a turn in it."""
    condition = replace(CONDITION, policies=("a", "b", RAW), seldom=(RAW,), rounds=4)
    assert pd_plan.another(condition, done, {"a": 2.0, "b": 3.0, RAW: 60.0}, left_s) == begins


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
    turn = replace(
        TURN,
        timings=tuple(timings),
        grown={
            "transfers{receive,joint-3}": 1.0,
            "native_bytes{receive,joint-3}": 2e6,
            "native_bytes{receive,none}": 6e6,
            "transfers{receive,none}": 3.0,
            "transfers{send,none}": 9.0,
            "transfer_failures{receive,Timeout}": 2.0,
        },
    )
    found = pd_rows.row(
        CONDITION,
        KVSERVE,
        [turn],
        mbit=20.0,
        losses_bp={"joint-3": 40.0, "none": 0.0},
        objective_s=1.0,
    )
    assert found["profiles"] == {"joint-3": 1, "none": 3}
    assert found["loss_bp"] == 10.0
    assert (found["errors"], found["recomputed"], found["requests"]) == (1, 2, 4)
    assert found["attained"] == 0.5
    assert found["attained_each"] == [True, False, False, True]
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
    assert pd_rows.vs_best_static(rows, ["cachegen"]) == {
        MOVING: {"static": "joint-3", "times": 0.5, "pair_by_pair": 0.5}
    }
    assert pd_rows.vs_raw(rows)[MOVING][KVSERVE] == 4.5


def test_the_best_fixed_profile_is_held_against_the_same_requests() -> None:
    """A profile with fewer rounds is compared over these alone, so that easy requests do not make it the best."""
    rows = [row(KVSERVE, 1.0, 3.0, rounds=2), row("a", 1.0, 2.0, rounds=2), row("b", 1.0)]
    assert pd_rows.vs_best_static(rows, []) == {
        MOVING: {"static": "a", "times": pytest.approx(4 / 3), "pair_by_pair": 1.25}
    }


QUALITY = {"none": 0.0, "small": 30.0, "large": 10.0}
IN_TIME, LATE = 1.0, 9.0


@pytest.mark.parametrize(
    ("fixed", "ours", "times"),
    [
        pytest.param([("a", 0, 40.0), ("b", 0, 30.0)], (0, "large"), 3.0, id="least-lossy"),
        pytest.param([("a", 2, 1.0), ("b", 1, 30.0)], (1, "large"), 3.0, id="equal-attainment"),
        pytest.param([("a", 2, 1.0)], (1, "large"), math.inf, id="none-attains"),
        pytest.param([(RAW, 1, 0.0)], (1, "large"), 0.0, id="raw-attains"),
        pytest.param([(RAW, 1, 0.0)], (1, "none"), 1.0, id="both-raw"),
    ],
)
def test_less_loss_is_counted_at_equal_attainment(
    fixed: list[tuple[str, int, float]], ours: tuple[int, str], times: float
) -> None:
    """Only fixed profiles that keep the objective at least as often count, over the requests that both had."""
    group = {
        name: row(name, *[LATE] * late, *[IN_TIME] * (6 - late), rounds=3, loss_bp=loss_bp)
        for name, late, loss_bp in fixed
    }
    late, profile = ours
    quality = row(KVSERVE_QUALITY, *[LATE] * late, *[IN_TIME] * (12 - late), rounds=6)
    for part in quality["rounds"]:
        part["loss_bp"] = QUALITY[profile]
    found = pd_claims.less_loss(group | {KVSERVE_QUALITY: quality})
    assert found is not None
    assert found.value == times
    assert found.low <= found.value <= found.high


def test_claims_hold_or_are_missed_by_what_was_measured() -> None:
    """Each claim takes its own condition's rows, and holds only if its interval does; few requests show nothing."""
    ones = [1.0, 2.0] * 4
    rows = [
        row(RAW, *[30.0] * 8, name=PAPERS_REGIME, link_s=12.0, prefills_s=1.0),
        row(KVSERVE, *[3.0] * 8, name=PAPERS_REGIME),
        row(RAW, *[9.0] * 8, rounds=4),
        row("joint-3", *[2.0] * 8, rounds=4),
        row(KVSERVE, *[2.1] * 8, rounds=4),
        row(ALONE, *ones, name=ONE_BY_ONE, rounds=4),
        row(RAW, *(1.04 * s for s in ones), name=ONE_BY_ONE, rounds=4),
        row(
            KVSERVE,
            *(1.04 * s * f for s, f in zip(ones, [0.9, 1.1] * 4, strict=True)),
            name=ONE_BY_ONE,
            rounds=4,
        ),
    ]
    found = pd_claims.claims(rows, [])
    assert [(round(one["value"], 3), one["verdict"]) for one in found] == [
        (10.0, "holds"),
        (1.05, "missed"),
        (1.0, "unclear"),
        (1.04, "holds"),
    ]
    assert "12.0 times as long as their prefills" in found[0]["claim"]
    few = pd_claims.claims([row(RAW, 1.0, name=ONE_BY_ONE), row(ALONE, 1.0, name=ONE_BY_ONE)], [])
    assert [(one["verdict"], one["low"]) for one in few] == [("unclear", None)]


def test_outside_of_the_regime_its_claim_is_unclear() -> None:
    """Raw transfers of less than ten times their prefill are not what the target is about."""
    rows = [
        row(RAW, *[30.0] * 8, name=PAPERS_REGIME, link_s=9.0, prefills_s=1.0),
        row(KVSERVE, *[3.0] * 8, name=PAPERS_REGIME),
    ]
    (found,) = pd_claims.claims(rows, [])
    assert (found["value"], found["verdict"], found["holds"]) == (10.0, "unclear", False)


def test_turns_add_up() -> None:
    """Requests follow each other, bytes and counters are sums, and the load is that of all arrivals together."""
    turns = [
        replace(
            TURN,
            timings=(Timing(at_s=0.0, tokens=500, prefill_s=0.5, ttft_s=1.0, jct_s=jct_s),) * 2,
            bytes_wire=3,
            grown={
                f"transfers{{receive,{name}}}": 2.0,
                f"native_bytes{{receive,{name}}}": native_bytes,
                "total_seconds{receive,x}": 1.0,
            },
            per_s=per_s,
        )
        for jct_s, per_s, name, native_bytes in ((1.0, 1.0, "a", 30.0), (2.0, 0.5, "b", 10.0))
    ]
    found = pd_rows.row(CONDITION, RAW, turns, mbit=20.0, losses_bp={"a": 1, "b": 3}, objective_s=1)
    assert found["jct_each_s"] == [1.0, 1.0, 2.0, 2.0]
    assert (found["bytes_wire"], found["profiles"], found["loss_bp"]) == (6, {"a": 2, "b": 2}, 1.5)
    assert found["stages_s"]["total"] == 2.0
    assert found["per_s"] == pytest.approx(4 / 6)
    assert [part["profiles"] for part in found["rounds"]] == [{"a": 2}, {"b": 2}]
    assert pd_rows.by_round(found, found["jct_each_s"]) == [[1.0, 1.0], [2.0, 2.0]]


def test_the_regime_is_what_was_measured() -> None:
    """Bytes over the link's rate, over prefills at the speeds that were measured beside the turns."""
    timings = (Timing(at_s=0.0, tokens=1000, prefill_s=0.5, ttft_s=1.0, jct_s=1.0),)
    turns = [
        replace(
            TURN,
            timings=timings,
            prefill_s_per_token=prefill_s_per_token,
            grown={"wire_bytes{receive,none}": 25e6, "wire_bytes{send,none}": 25e6},
        )
        for prefill_s_per_token in (1e-3, 3e-3)
    ]
    condition = replace(CONDITION, moving=False)
    found = pd_rows.row(condition, RAW, turns, mbit=20.0, losses_bp={}, objective_s=1.0)
    assert (found["link_s"], found["prefills_s"]) == pytest.approx((20.0, 4.0))


def test_pairs_are_of_requests_that_both_answered() -> None:
    """Requests keep their rounds, and those that failed once, or that only one policy had, are left out."""
    longer = row(KVSERVE, 1.0, 2.0, 3.0, 4.0, rounds=2)
    longer["jct_each_s"][1] = None
    assert pd_rows.pairs(longer, row(RAW, 5.0, 6.0)) == [[(1.0, 5.0)]]
    assert pd_rows.pairs(row(RAW, 5.0, 6.0, 7.0, 8.0, rounds=2), longer) == [
        [(5.0, 1.0)],
        [(7.0, 3.0), (8.0, 4.0)],
    ]


def stages_s(exposed_s: float, total_s: float) -> dict[str, Any]:
    """Return a round of which the connector counted so much."""
    return {"requests": 1, "stages_s": {"exposed": exposed_s, "total": total_s}}


def test_what_is_hidden_is_counted_by_the_connector() -> None:
    """Of the row that pulls while the prefill goes on; rounds without a transfer say nothing."""
    early = row("early", 1.6, name=OVERLAP)
    early["rounds"] = [stages_s(0.5, 1.0), stages_s(0.1, 2.0), stages_s(0.0, 0.0)]
    late = row("late" + pd_plan.LATE, 2.1, name=OVERLAP)
    found = pd_claims.hidden({one["policy"]: one for one in (late, early)})
    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert found.items == 2
    assert pd_claims.hidden({late["policy"]: late}) is None


def test_overlap_compares_both_ways_of_a_request() -> None:
    """Times to the first token and of the prefill, each over that of the same request pulled afterwards."""
    late = row("late", 2.1, 2.1, 2.1, prefill_each_s=[0.95, 0.95, None], name=OVERLAP)
    early = row("early", 1.6, 1.5, 1.4, prefill_each_s=[1.2, 1.3, 1.0], name=OVERLAP)
    late["policy"] += pd_plan.LATE
    found = pd_claims.overlap([late, early])
    assert found is not None
    assert found["ttft_times"]["value"] == pytest.approx(1.4 / 2.0)
    assert found["prefill_times"]["value"] == pytest.approx(1.25 / 0.95)
    assert pd_claims.overlap([late]) is None


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
