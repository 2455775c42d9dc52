"""The selection law, which leaves out whatever can't win any more, against itself written out plainly."""

import math
from dataclasses import replace
from typing import NamedTuple

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from decision_tables import busy_links, tables
from kvserve_api.latency import MOST_UTILISATION, Link, Prediction, predict
from kvserve_api.policy import Goal
from kvserve_api.selection import (
    EQUAL,
    FITS,
    LATE,
    LEAST_GAIN,
    NEAR,
    QUIET,
    TIGHT,
    UNSTABLE,
    Bound,
    select,
)
from kvserve_api.table import HOPE, DecisionTable, Doubt

CLOSE = 1e-9
"""Sums in another order differ by less; merits as near as that are a matter of rounding."""


class Held(NamedTuple):
    """What one candidate is held to be."""

    level: int
    merit: float
    seconds: float
    name: str
    prediction: Prediction


def by_goal(drawn: DecisionTable, name: str) -> float:
    """Return the merit of a candidate by a goal other than the time."""
    candidate = drawn.candidates[name]
    goal = drawn.rules["default"].goal
    return candidate.loss_upper_bp if goal is Goal.MAXIMIZE_QUALITY else -candidate.ratio


def weigh(drawn: DecisionTable, size: int, link: Link, chunks: int, incumbent: str) -> list[Held]:
    """Return all candidates, weighed one by one."""
    rule = drawn.rules["default"]
    latency = rule.goal is Goal.MINIMIZE_LATENCY
    held = []
    for name in rule.candidates:
        c = drawn.candidates[name]
        p = predict(
            native_bytes=size,
            ratio=c.ratio,
            encode=c.encode,
            decode=c.decode,
            link=link,
            chunks=chunks,
        )
        percentile_s = p.total_s * rule.margins.get(name, 1.0)
        keeps = latency or name == incumbent or not incumbent
        # what the prefill hides comes on top of the deadline, but for the last chunk
        deadline_s = rule.deadline_s + link.hidden_s
        limit_s = deadline_s if keeps else deadline_s / (1 + drawn.hysteresis)
        level = LATE if percentile_s > deadline_s else TIGHT if percentile_s > limit_s else FITS
        last_s = (p.encode_s + p.wire_s + p.decode_s) / chunks
        if link.hidden_s and last_s * rule.margins.get(name, 1.0) > rule.deadline_s:
            level = LATE
        merit = p.total_s + p.others_s
        if p.utilisation > MOST_UTILISATION:
            level = UNSTABLE
        if level < LATE and not latency:
            merit = by_goal(drawn, name)
        held.append(Held(level, merit, p.total_s, name, p))
    return held


def hoped(drawn: DecisionTable, one: Held, chunks: int) -> tuple[float, float]:
    """Return the merit that a candidate may hope for, and the seconds that it would save."""
    doubt, p = drawn.candidates[one.name].doubt, one.prediction
    if drawn.rules["default"].goal is Goal.MINIMIZE_BYTES:
        return one.merit / math.exp(-HOPE * doubt.wire), math.inf
    times = ((p.encode_s, doubt.encode), (p.wire_s, doubt.wire), (p.decode_s, doubt.decode))
    saved = [seconds * (1 - math.exp(-HOPE * unsure)) for seconds, unsure in times]
    slowest = max(zip((p.encode_s, p.wire_s, p.decode_s), saved, strict=True))[1]
    saved_s = slowest + (sum(saved) - slowest) / chunks
    return one.merit - saved_s, saved_s


def plainly(
    drawn: DecisionTable, size: int, link: Link, chunks: int, incumbent: str, allowance_s: float
) -> tuple[str, Bound, bool]:
    """Return the profile, what decided, and whether another is as good but for rounding."""
    rule = drawn.rules["default"]
    held = weigh(drawn, size, link, chunks, incumbent)
    best = min(held, key=lambda one: (one.level, one.merit, one.seconds))
    near = [one for one in held if one is not best and one.level == best.level]
    tied = any(math.isclose(one.merit, best.merit, rel_tol=CLOSE) for one in near)
    limits = (rule.deadline_s, rule.deadline_s / (1 + drawn.hysteresis))
    for one in held:
        percentile_s = one.seconds * rule.margins.get(one.name, 1.0)
        tied |= any(math.isclose(percentile_s, limit_s, rel_tol=CLOSE) for limit_s in limits)
        tied |= math.isclose(one.prediction.utilisation, MOST_UTILISATION, rel_tol=CLOSE)
    bound = (Bound.GOAL, Bound.GOAL, Bound.DEADLINE, Bound.UNSTABLE)[best.level]
    queue_s = link.backlog_bytes / link.bytes_per_s
    waiting_s = link.rtt_s + max(link.encode_backlog_s, queue_s, link.decode_backlog_s)
    latency = rule.goal is Goal.MINIMIZE_LATENCY
    if best.level == LATE and not latency:
        most_s = best.merit * (1 + NEAR)
        fast = [one for one in held if one.level == LATE and one.merit <= most_s]
        best = min(fast, key=lambda one: (by_goal(drawn, one.name), one.merit))
        others = [one.merit for one in held if one is not best]
        tied |= any(math.isclose(merit, most_s, rel_tol=CLOSE) for merit in others)
        tied |= any(math.isclose(merit, best.merit, rel_tol=CLOSE) for merit in others)
    own = next((one for one in held if one.name == incumbent), None)
    least, losses = best, {name: drawn.candidates[name].loss_upper_bp for name in rule.candidates}
    if best.level == FITS and latency:
        room = EQUAL * (least.merit - waiting_s)
        fitting = [one for one in held if one.level == FITS]
        equal = [one for one in fitting if one.merit - least.merit <= room]
        best = min(equal, key=lambda one: (losses[one.name], one.merit, one.seconds))
        for one in fitting:
            worse = one.merit - least.merit
            tied |= one is not least and math.isclose(
                worse, room, rel_tol=1e-6, abs_tol=CLOSE * least.merit
            )
            tied |= one is not best and math.isclose(one.merit, best.merit, rel_tol=CLOSE)
    if own is not None and own is not best and own.level == best.level and latency:
        room = drawn.hysteresis * (least.merit - waiting_s)
        worse = own.merit - least.merit
        tied |= math.isclose(worse, room, rel_tol=1e-6, abs_tol=CLOSE * least.merit)
        if worse <= room and (best.level != FITS or losses[own.name] <= losses[best.name]):
            best, bound = own, Bound.KEPT if best.level < LATE else bound
    others_s = best.merit - best.seconds if latency else 0.0
    quiet = waiting_s + others_s <= QUIET * best.seconds
    tied |= math.isclose(waiting_s + others_s, QUIET * best.seconds, rel_tol=CLOSE)
    if not (allowance_s > 0 and best.level == FITS and quiet):
        return best.name, bound, tied
    hope, tried = best.merit, None
    for one in held:
        if one.name == best.name or one.level >= LATE or rule.goal is Goal.MAXIMIZE_QUALITY:
            continue
        extra_s = one.merit - best.merit if latency else one.seconds - best.seconds
        merit, saved_s = hoped(drawn, one, chunks)
        tied |= math.isclose(extra_s, allowance_s, rel_tol=CLOSE)
        tied |= math.isclose(merit, hope, rel_tol=CLOSE)
        tied |= math.isclose(saved_s, (1 + LEAST_GAIN) * extra_s, rel_tol=CLOSE)
        if latency and saved_s - extra_s < LEAST_GAIN * extra_s:
            continue
        if merit < hope and extra_s <= allowance_s:
            hope, tried = merit, one
    return (tried.name, Bound.EXPLORED, tied) if tried else (best.name, bound, tied)


@settings(max_examples=60)
@given(
    drawn=tables(),
    size=st.integers(1 << 10, 1 << 30),
    link=busy_links,
    chunks=st.integers(1, 32),
    seat=st.integers(-1, 7),
    hysteresis=st.floats(0, 0.3),
    doubt=st.floats(0, 2),
    allowance_s=st.just(0.0) | st.floats(1e-3, 10),
    margin=st.floats(1, 3),
)
def test_nothing_is_left_out_that_could_win(
    drawn: DecisionTable,
    size: int,
    link: Link,
    chunks: int,
    seat: int,
    hysteresis: float,
    doubt: float,
    allowance_s: float,
    margin: float,
) -> None:
    """With a profile in use, margins, doubts and an allowance, the choice is that of the plain law."""
    loads = (link.load, link.encoder_load)
    # bytes come with arrivals
    assume(any(x.arrivals_per_s for x in loads) or not any(x.native_bytes_per_s for x in loads))
    rule = drawn.rules["default"]
    names = rule.candidates
    unsure = replace(
        drawn,
        hysteresis=hysteresis,
        rules={
            "default": replace(rule, explore_share=0.02, margins=dict.fromkeys(names[::2], margin))
        },
        candidates={
            name: replace(c, doubt=Doubt(encode=doubt, decode=doubt / 2, wire=doubt / 3))
            for name, c in drawn.candidates.items()
        },
    )
    incumbent = names[seat % len(names)] if seat >= 0 else None
    name, bound, tied = plainly(unsure, size, link, chunks, incumbent or "", allowance_s)
    assume(not tied)
    chosen = select(
        unsure,
        "default",
        native_bytes=size,
        link=link,
        chunks=chunks,
        incumbent=incumbent,
        allowance_s=allowance_s,
    )
    assert (chosen.profile, chosen.bound) == (name, bound)
