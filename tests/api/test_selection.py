"""The selection law."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.latency import Link, StageCost, predict
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import NONE, Profile
from kvserve_api.selection import Bound, select
from kvserve_api.table import Candidate, ClassRule, DecisionTable, OnControllerLoss, Version
from samples import INT4, INT8, RANS, RAW, profile

MBIT = 125_000.0
SIZE = 50_000_000


def table(
    *profiles: Profile,
    goal: Goal = Goal.MINIMIZE_LATENCY,
    deadline_s: float = math.inf,
    mode: Mode = Mode.ACTIVE,
    pinned: str | None = None,
    fallback: str = NONE,
) -> DecisionTable:
    """Return a table of one rule over the given profiles, or four usual ones."""
    chosen = profiles or (RANS, INT4, INT8, RAW)
    return DecisionTable(
        version=Version(epoch=1, counter=1),
        policy="default/chat",
        mode=mode,
        candidates={
            p.name: Candidate(
                name=p.name,
                strategy=p.strategy,
                ratio=p.ratio,
                loss_upper_bp=p.loss_upper_bp,
                encode=p.encode,
                decode=p.decode,
            )
            for p in chosen
        },
        rules={
            "default": ClassRule(
                goal=goal, candidates=tuple(p.name for p in chosen), deadline_s=deadline_s
            )
        },
        pinned=pinned,
        fallback=fallback,
        ttl_s=60.0,
        on_controller_loss=OnControllerLoss.HOLD_LAST_GOOD,
        prior_bytes_per_s=125e6,
    )


@st.composite
def tables(draw: st.DrawFn, goal: Goal | None = None) -> DecisionTable:
    """Draw a table of up to eight random profiles."""
    others = [
        replace(
            profile(
                f"p{n}",
                ratio=draw(st.floats(1.1, 20)),
                loss_bp=draw(st.floats(0, 100)),
                encode_bytes_per_s=draw(st.floats(1e7, 1e10)),
                decode_bytes_per_s=draw(st.floats(1e7, 1e10)),
            ),
            encode=StageCost(
                floor_s=draw(st.floats(0, 0.01)), bytes_per_s=draw(st.floats(1e7, 1e10))
            ),
        )
        for n in range(draw(st.integers(0, 7)))
    ]
    return table(
        *others,
        RAW,
        goal=goal or draw(st.sampled_from(list(Goal))),
        deadline_s=draw(st.floats(1e-3, 100) | st.just(math.inf)),
    )


sizes = st.integers(1, 1 << 32)
links = st.builds(
    Link,
    bytes_per_s=st.floats(1e4, 1e11),
    backlog_bytes=st.floats(0, 1e9),
    rtt_s=st.floats(0, 0.1),
)


@pytest.mark.parametrize(
    ("mbit", "profile_name"),
    [(100_000, "none"), (5_000, "none"), (3_000, "int8"), (1_000, "int4"), (20, "rans")],
)
def test_follows_the_link(mbit: float, profile_name: str) -> None:
    """On a fast link raw wins, on a slow one the largest ratio."""
    chosen = select(table(), "default", native_bytes=SIZE, link=Link(bytes_per_s=mbit * MBIT))
    assert (chosen.profile, chosen.wanted, chosen.bound) == (
        profile_name,
        profile_name,
        Bound.GOAL,
    )


@given(tables(), sizes, links, st.integers(1, 32))
def test_choice_is_a_candidate_and_repeatable(
    drawn: DecisionTable, size: int, link: Link, chunks: int
) -> None:
    """A choice is one of the class's candidates, so within its budget, and equal inputs give an equal choice."""
    chosen = select(drawn, "default", native_bytes=size, link=link, chunks=chunks)
    assert chosen.profile in drawn.rules["default"].candidates
    assert chosen == select(drawn, "default", native_bytes=size, link=link, chunks=chunks)


@given(tables(), sizes, links)
def test_deadline_comes_before_the_goal(drawn: DecisionTable, size: int, link: Link) -> None:
    """If any candidate meets the deadline so does the choice; if none does it is the fastest."""
    rule = drawn.rules["default"]
    times_s = {
        name: predict(
            native_bytes=size, ratio=c.ratio, encode=c.encode, decode=c.decode, link=link
        ).total_s
        for name, c in drawn.candidates.items()
    }
    chosen = select(drawn, "default", native_bytes=size, link=link)
    assert chosen.predicted_s == times_s[chosen.profile]
    if min(times_s.values()) <= rule.deadline_s:
        assert times_s[chosen.profile] <= rule.deadline_s
        assert chosen.bound is Bound.GOAL
    else:
        assert times_s[chosen.profile] == min(times_s.values())
        assert chosen.bound is Bound.DEADLINE


@given(tables(), sizes, links)
def test_goal_among_those_in_time(drawn: DecisionTable, size: int, link: Link) -> None:
    """Among the candidates that meet the deadline none is better by the goal."""
    rule = drawn.rules["default"]
    chosen = select(drawn, "default", native_bytes=size, link=link)
    if chosen.bound is Bound.DEADLINE:
        return
    own = drawn.candidates[chosen.profile]
    for other in drawn.candidates.values():
        seconds = predict(
            native_bytes=size,
            ratio=other.ratio,
            encode=other.encode,
            decode=other.decode,
            link=link,
        ).total_s
        if seconds > rule.deadline_s:
            continue
        match rule.goal:
            case Goal.MINIMIZE_LATENCY:
                assert chosen.predicted_s <= seconds
            case Goal.MAXIMIZE_QUALITY:
                assert own.loss_upper_bp <= other.loss_upper_bp
            case Goal.MINIMIZE_BYTES:
                assert own.ratio >= other.ratio


@given(tables(Goal.MINIMIZE_LATENCY), sizes, st.floats(1e4, 1e10), st.floats(1, 1e3))
def test_slower_link_never_means_a_smaller_ratio(
    drawn: DecisionTable, size: int, slow: float, factor: float
) -> None:
    """Minimising the time of an unchunked transfer, the ratio only grows as the link slows."""
    drawn = replace(drawn, rules={"default": replace(drawn.rules["default"], deadline_s=math.inf)})
    ratios = [
        drawn.candidates[
            select(drawn, "default", native_bytes=size, link=Link(bytes_per_s=speed)).profile
        ].ratio
        for speed in (slow, slow * factor)
    ]
    # equal times may be told apart by rounding only
    assert ratios[0] >= ratios[1] or factor < 1 + 1e-9


@given(tables(Goal.MINIMIZE_LATENCY), st.floats(1e4, 1e10), sizes, sizes)
def test_order_of_candidates_is_irrelevant(
    drawn: DecisionTable, speed: float, size: int, backlog: int
) -> None:
    """The order in which a rule names its candidates decides nothing."""
    rule = drawn.rules["default"]
    turned = replace(
        drawn, rules={"default": replace(rule, candidates=tuple(reversed(rule.candidates)))}
    )
    link = Link(bytes_per_s=speed, backlog_bytes=backlog)
    first, second = (select(t, "default", native_bytes=size, link=link) for t in (drawn, turned))
    assert first.predicted_s == second.predicted_s


@pytest.mark.parametrize(
    ("mode", "pinned", "expired", "expected"),
    [
        pytest.param(Mode.OFF, None, False, ("none", "none", Bound.OFF), id="off"),
        pytest.param(Mode.OFF, None, True, ("none", "none", Bound.OFF), id="off-expired"),
        pytest.param(Mode.PINNED, "rans", False, ("rans", "rans", Bound.PINNED), id="pinned"),
        pytest.param(Mode.PINNED, "rans", True, ("int8", "int8", Bound.EXPIRED), id="pin-expired"),
        pytest.param(Mode.ACTIVE, None, True, ("int8", "int8", Bound.EXPIRED), id="expired"),
        pytest.param(Mode.SHADOW, None, False, ("none", "int4", Bound.GOAL), id="shadow"),
        pytest.param(Mode.SHADOW, None, True, ("none", "int8", Bound.EXPIRED), id="shadow-expired"),
    ],
)
def test_modes(
    mode: Mode, pinned: str | None, expired: bool, expected: tuple[str, str, Bound]
) -> None:
    """Off sends raw, Pinned the pin, an expired table the fallback; Shadow never acts."""
    chosen = select(
        table(mode=mode, pinned=pinned, fallback="int8"),
        "default",
        native_bytes=SIZE,
        link=Link(bytes_per_s=1000 * MBIT),
        expired=expired,
    )
    assert (chosen.profile, chosen.wanted, chosen.bound) == expected


def test_consumer_that_cannot_decode() -> None:
    """What the consumer can't decode is not chosen, pinned or not; raw always is possible."""
    able = frozenset({INT8.strategy.digest})
    link = Link(bytes_per_s=MBIT)
    chosen = select(table(), "default", native_bytes=SIZE, link=link, decodable=able)
    assert (chosen.profile, chosen.bound) == ("int8", Bound.GOAL)
    pinned = table(mode=Mode.PINNED, pinned="rans")
    chosen = select(pinned, "default", native_bytes=SIZE, link=link, decodable=able)
    assert (chosen.profile, chosen.wanted, chosen.bound) == ("none", "rans", Bound.PEER)
    nothing = select(table(), "default", native_bytes=SIZE, link=link, decodable=frozenset())
    assert nothing.profile == "none"
