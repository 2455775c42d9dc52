"""A transfer whose link becomes another one while it is sent."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hostile_proxy import HostileProxy
from kv_loopback import BLOCK, LAYOUT, Pair, pair
from kvserve_api.latency import Link, StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.selection import Bound, Selection
from kvserve_api.table import ClassRule, DecisionTable
from kvserve_connector.chunks import DEADLINE_TOKENS, Chunk, plan
from kvserve_connector.coding import known_stages, raw_pipeline
from kvserve_connector.commands import PARTS
from kvserve_connector.control_messages import report_message
from kvserve_connector.course import FIRST_BYTES, Course, Rest
from kvserve_connector.encoder import Coded
from kvserve_connector.goodput import Goodput
from kvserve_connector.links import LinkBook, LinkState
from kvserve_connector.midway import MOST_CHANGES, MOVED, by_merit, common_step, follows, moved
from kvserve_connector.outcome import Outcome
from kvserve_connector.ready import ReadyTable
from kvserve_connector.selector import Choice, Selector
from kvserve_strategies import Pipeline
from tables import RATIOS, candidate, table

FROM, TO = (3, 9, 5, 20, 11), (1, 2, 4, 8, 16)
TOKENS = 80
LAYERS = range(LAYOUT.layers)
FAST, SLOW = 1e9, 1e4
NATIVE_BYTES = LAYOUT.native_bytes(TOKENS)


def for_quality(deadline_s: float = 3.0, **changes: Any) -> DecisionTable:
    """Return a table that wants the least loss within a deadline: raw on a fast link, `int4-token` on a slow one."""
    names = ("none", "int8-token", "int4-token")
    rule = ClassRule(goal=Goal.MAXIMIZE_QUALITY, candidates=names, deadline_s=deadline_s)
    return table(*names, rules={"default": rule}, **changes)


@contextmanager
def believed(both: Pair, course: Sequence[float]) -> Iterator[None]:
    """Have the link be believed as fast as given after each look at it; the last rate lasts."""
    rates = itertools.chain(course, itertools.repeat(course[-1]))
    link = both.links.link("127.0.0.1")

    def look(*_: object, **__: object) -> None:
        rate = next(rates)
        link._goodput = Goodput(bytes_per_s=rate, shown_bytes_per_s=rate)

    look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinkState, "sample", look)
        patch.setattr(LinkState, "_learn", lambda *_, **__: None)
        yield


def send(both: Pair, ready: ReadyTable, course: Sequence[float]) -> Outcome:
    """Send raw at first, over a link that is believed to be so fast after each chunk."""
    both.selector.install(ready)
    both.lease("a", TOKENS, FROM)
    with believed(both, course):
        outcome = both.fetch(both.load("a", range(TOKENS), TO))
    assert outcome.failure == ""
    assert both.links.link("127.0.0.1").snapshot(1.0, both.links.coders).backlog_bytes == 0
    assert both.links.coders.backlog_s == 0
    return outcome


def values(both: Pair, layers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of some layers, as they were and as they arrived."""
    ours = torch.stack(both.source.read_tokens(layers, range(TOKENS), FROM))
    return ours, torch.stack(both.target.read_tokens(layers, range(TOKENS), TO))


def test_a_fall_makes_the_rest_coarser() -> None:
    """What is not coded yet when the link is known to have fallen is coded coarser; all of it arrives as it should."""
    with pair(chunk_layers=1) as both:
        outcome = send(both, ReadyTable.of(for_quality()), (FAST, FAST, SLOW))
        assert outcome.accept is not None
        assert outcome.end is not None
        assert (outcome.accept.profile, len(outcome.accept.chunks)) == ("none", LAYOUT.layers)
        # two chunks had gone when it was known, and a third was being coded
        one = LAYOUT.native_bytes(TOKENS) // LAYOUT.layers
        assert {name: part.native_bytes for name, part in outcome.end.parts.items()} == {
            "none": 3 * one,
            "int4-token": 4 * one,
        }
        ours, theirs = values(both, range(3))
        assert torch.equal(ours, theirs)
        ours, theirs = values(both, range(3, LAYOUT.layers))
        assert 0 < (ours - theirs).float().abs().max() < 0.6


def test_reports_say_what_each_profile_coded() -> None:
    """Shares go to the controller, and bytes and seconds of both sides are counted under each profile."""
    with pair(chunk_layers=1) as both:
        outcome = send(both, ReadyTable.of(for_quality()), (FAST, FAST, SLOW))
        report = report_message(outcome)
        assert report.profile == "none"
        assert dict(report.shares) == pytest.approx({"none": 3 / 7, "int4-token": 4 / 7})
        assert both.ended()[1] == {"Sent": 1}
        both.metrics.received(outcome)
        rows = both.metrics.take_totals()["rows"]
        assert rows.keys() == {
            f"{way} {name}" for way in ("send", "receive") for name in ("none", "int4-token")
        }
        for way in ("send", "receive"):
            of_none, of_int4 = rows[f"{way} none"], rows[f"{way} int4-token"]
            # one transfer, of the profile that it began with
            assert (of_none[0], of_int4[0]) == (1, 0)
            assert of_none[1] + of_int4[1] == NATIVE_BYTES
            assert of_none[1] / of_none[2] < 1 < of_int4[1] / of_int4[2]
        assert rows["receive none"][6] + rows["receive int4-token"][6] == pytest.approx(
            outcome.total_s
        )


def test_a_decision_says_that_and_why_it_changed() -> None:
    """Beside the transfer's first decision there is one of its rest, with both rates and what was in use."""
    with pair(chunk_layers=1) as both:
        send(both, ReadyTable.of(for_quality()), (FAST, FAST, SLOW))
        first, again = both.selector.decisions
        assert (first.native_bytes, first.before_bytes_per_s) == (NATIVE_BYTES, 0.0)
        assert again.native_bytes == NATIVE_BYTES * 4 // 7
        assert (again.incumbent, again.selection.profile) == ("none", "int4-token")
        assert (again.before_bytes_per_s, again.link.bytes_per_s) == (FAST, SLOW)
        assert again.chunks == 4
        assert again.spent_s > 0
        # nothing but the one chunk that is being coded stands before the rest
        assert again.link.backlog_bytes == pytest.approx(NATIVE_BYTES / 7)


def test_a_rise_makes_the_rest_finer() -> None:
    """Where the link turns out faster than was believed, no more quality is given away."""
    with pair(chunk_layers=1) as both:
        outcome = send(both, ReadyTable.of(for_quality()), (SLOW, FAST))
        assert outcome.accept is not None
        assert outcome.end is not None
        assert outcome.accept.profile == "int4-token"
        assert outcome.end.parts.keys() == {"int4-token", "none"}


@pytest.mark.parametrize(
    ("made", "course"),
    [
        pytest.param(for_quality(), (SLOW, SLOW * 1.4, SLOW / 1.4, SLOW), id="steady"),
        pytest.param(table(pinned="int4-token"), (FAST, SLOW), id="pinned"),
        pytest.param(for_quality(mode=Mode.SHADOW), (FAST, SLOW), id="shadow"),
        pytest.param(for_quality(mode=Mode.OFF), (FAST, SLOW), id="off"),
    ],
)
def test_what_stays_as_it_was(made: DecisionTable, course: Sequence[float]) -> None:
    """A link that only scatters changes nothing, nor does any link where the link does not decide."""
    with pair(chunk_layers=1) as both:
        outcome = send(both, ReadyTable.of(made), course)
        assert outcome.end is not None
        assert outcome.end.parts == {}
        assert list(report_message(outcome).shares) == []
        assert len(both.selector.decisions) == 1


def test_a_table_that_pins_meanwhile_changes_nothing() -> None:
    """By the table in force nothing is chosen by the link any more: the transfer goes on as it began."""
    with pair(chunk_layers=1) as both:
        both.selector.install(ReadyTable.of(for_quality()))

        def pin(*_: object) -> None:
            both.selector.install(ReadyTable.of(table(pinned="int4-token")))
            link = both.links.link("127.0.0.1")
            link._goodput = Goodput(bytes_per_s=SLOW, shown_bytes_per_s=SLOW)

        both.lease("a", TOKENS, FROM)
        with believed(both, (FAST,)), pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinkState, "sample", pin)
            outcome = both.fetch(both.load("a", range(TOKENS), TO))
        assert outcome.accept is not None
        assert outcome.end is not None
        assert (outcome.accept.profile, outcome.end.parts) == ("none", {})


def test_consumers_that_know_no_parts_get_none() -> None:
    """One profile codes all that a consumer is sent which would not understand more."""
    with pair(chunk_layers=1) as both:
        both.client._wishes -= {PARTS}
        outcome = send(both, ReadyTable.of(for_quality()), (FAST, FAST, SLOW))
        assert outcome.end is not None
        assert outcome.end.parts == {}


def test_what_was_coded_ahead_is_not_sent_when_it_is_too_fine() -> None:
    """Chunks that wait in memory are coded anew once another profile is to code the rest."""
    with pair(chunk_layers=1, encode_ahead_bytes=1 << 20) as both:
        ready = ReadyTable.of(for_quality(deadline_s=0.08))
        both.selector.install(ready)
        fair = NATIVE_BYTES / RATIOS["int8-token"] / 0.05
        with believed(both, (fair,)):
            both.lease("first", 20, FROM)
            assert both.fetch(both.load("first", range(20), TO)).failure == ""
            both.begin("a", TOKENS)
            both.advance("a", TOKENS, FROM)
            ahead = both.server.pulls._ahead
            assert ahead is not None
            last = -1
            while (now := ahead.nbytes) != last:
                last = now
                time.sleep(0.2)
            assert now > 0
        outcome = send(both, ready, (fair, fair, SLOW))
        assert outcome.end is not None
        parts = outcome.end.parts
        assert parts.keys() == {"int8-token", "int4-token"}
        assert parts["int8-token"].native_bytes == NATIVE_BYTES * 3 // 7


def test_a_link_that_really_falls() -> None:
    """Over a socket that lets 2 MB/s through, a transfer that began raw as for 1 GB/s ends coarser, and is right."""
    blocks = tuple(range(1024))
    tokens = len(blocks) * BLOCK
    with (
        pair(chunk_layers=1, timeout_s=30.0, stall_s=10.0, blocks=len(blocks)) as both,
        HostileProxy(both.server.port, bytes_per_s=2e6) as proxy,
    ):
        link = both.links.link("127.0.0.1")
        link._goodput = Goodput(bytes_per_s=FAST, shown_bytes_per_s=FAST)
        both.selector.install(ReadyTable.of(for_quality(deadline_s=1.0)))
        both.lease("a", tokens, blocks)
        outcome = both.fetch(both.load("a", range(tokens), blocks, port=proxy.port), 30.0)
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert outcome.end is not None
        assert outcome.accept.profile == "none"
        # chunks are less than a burst, so how soon the fall is believed, and how much of it, is the scheduler's
        coarser = outcome.end.parts.keys() - {"none"}
        assert coarser
        assert coarser <= {"int8-token", "int4-token"}
        first = outcome.accept.chunks[0]
        assert len(first.tokens) == DEADLINE_TOKENS
        for layers, taken, most in (
            (first.layers, first.tokens, 0.0),
            (range(LAYOUT.layers), range(tokens), 0.6),
        ):
            ours = torch.stack(both.source.read_tokens(layers, taken, blocks))
            theirs = torch.stack(both.target.read_tokens(layers, taken, blocks))
            assert (ours - theirs).float().abs().max() <= most


def choice(name: str, bound: Bound = Bound.GOAL) -> Choice:
    """Return the choice of a profile."""
    one = candidate(name)
    selection = Selection(profile=name, wanted=name, bound=bound)
    pipeline = Pipeline.of(one.strategy)
    return Choice(selection, pipeline, one.ratio, None, one.encode, one.decode)


def course_of(
    link: LinkState,
    book: LinkBook,
    answers: Iterator[Choice | None],
    asked: list[Rest],
    *,
    known: bool = True,
) -> Course:
    """Return the course of a transfer of ten chunks of 1,000 bytes, chosen for a link that is fast or thought so."""

    def again(rest: Rest) -> Choice | None:
        asked.append(rest)
        return next(answers)

    chunks = [Chunk(layers=range(n, n + 1), tokens=range(1)) for n in range(10)]
    if known:
        rate(link, FAST)
    return Course(choice("none"), chunks, [1000] * 10, link, book.coders, FAST, again)


def rate(link: LinkState, bytes_per_s: float) -> None:
    """Have a link be believed so fast."""
    link._goodput = Goodput(bytes_per_s=bytes_per_s, shown_bytes_per_s=bytes_per_s)


def test_promises_follow_the_course() -> None:
    """What is begun stands ahead of others as it was coded, the rest as it will be, and at the end nothing."""
    book = LinkBook()
    link = book.link("10.0.0.1")
    course = course_of(link, book, iter([choice("int4-token")]), [])
    assert link.snapshot(1.0).backlog_bytes == 10_000
    assert course.pipeline(0) is course.pipeline(1) is raw_pipeline()
    course.sent(Coded(0, memoryview(b"x"), 0.0, raw_pipeline()))
    rate(link, SLOW)
    assert course.pipeline(2) is choice("int4-token").pipeline
    assert link.snapshot(1.0).backlog_bytes == pytest.approx(1000 + 8000 / RATIOS["int4-token"])
    course.sent(Coded(1, memoryview(b"x"), 0.0, raw_pipeline()))
    course.sent(Coded(2, memoryview(b"x"), 0.5, choice("int4-token").pipeline))
    assert link.snapshot(1.0).backlog_bytes == pytest.approx(7000 / RATIOS["int4-token"])
    assert {name: part.native_bytes for name, part in course.parts.items()} == {
        "none": 2000,
        "int4-token": 1000,
    }
    course.end()
    assert link.snapshot(1.0).backlog_bytes == 0
    assert book.coders.backlog_s == 0


def test_what_is_coded_stands_ahead_on_the_link_only() -> None:
    """A chunk that waits for the link keeps no coder from others, and says at once how fast coders are."""
    book = LinkBook()
    link = book.link("10.0.0.1")
    one = choice("int4-token")
    chunks = [Chunk(layers=range(n, n + 1), tokens=range(1)) for n in range(10)]
    course = Course(one, chunks, [1_000_000] * 10, link, book.coders, FAST, None)
    whole_s, wire_bytes = one.encode.seconds(10_000_000), link.snapshot(1.0).backlog_bytes
    assert book.coders.backlog_s == pytest.approx(whole_s)
    coded = Coded(0, memoryview(b"x"), whole_s, course.pipeline(0))
    course.coded(coded)
    factor = book.coders.factor
    assert factor > 1.0
    assert book.coders.backlog_s == pytest.approx(0.9 * whole_s * factor)
    assert link.snapshot(1.0).backlog_bytes == wire_bytes
    course.sent(coded)
    assert book.coders.factor == factor
    assert book.coders.backlog_s == pytest.approx(0.9 * whole_s * factor)
    assert link.snapshot(1.0).backlog_bytes == pytest.approx(0.9 * wire_bytes)
    course.end()
    assert book.coders.backlog_s == 0


def test_asked_only_when_the_link_has_moved() -> None:
    """Within a factor of what was chosen for nobody is asked; after an answer, from where the link is then."""
    book = LinkBook()
    link = book.link("10.0.0.1")
    asked: list[Rest] = []
    course = course_of(link, book, itertools.repeat(None), asked)
    for place, bytes_per_s in enumerate((1.0, 0.7, 1.4, 0.5, 0.4, 0.7, 1.2, 1.0)):
        rate(link, FAST * bytes_per_s)
        course.pipeline(place)
    assert [rest.before_bytes_per_s / FAST for rest in asked] == [1.0, 0.5]
    assert [rest.native_bytes for rest in asked] == [7000, 4000]
    assert link.snapshot(1.0).backlog_bytes == pytest.approx(10_000)


def test_first_bytes_say_little_of_an_unknown_link() -> None:
    """Of a link that nothing was known of nobody asks before more than bursts has been sent."""
    book = LinkBook()
    link = book.link("10.0.0.1")
    asked: list[Rest] = []
    course = course_of(link, book, itertools.repeat(None), asked, known=False)
    blob = memoryview(bytes(FIRST_BYTES // 4))
    for place in range(6):
        course.pipeline(place)
        rate(link, SLOW)
        course.sent(Coded(place, blob, 0.0, raw_pipeline()))
        assert len(asked) == (place > 3)
    assert asked[0].before_bytes_per_s == FAST


def test_changes_are_few() -> None:
    """After so many changes a transfer is left as it is, however the link goes on moving."""
    book = LinkBook()
    link = book.link("10.0.0.1")
    asked: list[Rest] = []
    answers = itertools.cycle((choice("int4-token"), choice("none")))
    course = course_of(link, book, answers, asked)
    for place in range(10):
        rate(link, SLOW if place % 2 else FAST)
        course.pipeline(place)
    assert len(asked) == MOST_CHANGES


def test_moved() -> None:
    """A link has moved by more than a factor, either way."""
    assert [moved(1.0, now) for now in (1.0, MOVED, 1 / MOVED, 1.01 * MOVED, 0.99 / MOVED)] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("bound", list(Bound))
def test_only_what_the_link_decides_is_chosen_again(bound: Bound) -> None:
    """What is fixed, tried out or only shown stays as it is."""
    made = Selection(profile="none", wanted="none", bound=bound)
    expected = bound in (Bound.GOAL, Bound.KEPT, Bound.DEADLINE, Bound.UNSTABLE)
    assert by_merit(made) is expected
    assert not by_merit(made._replace(wanted="int4-token"))


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_plans_that_others_can_go_on_with(layers: int, steps: list[int], most_layers: int) -> None:
    """Chunks grow for the first one's sake only, which can code them; so can all whose step divides theirs."""
    first, *others = steps
    step = common_step(first, others, most_layers)
    assert step % first == 0
    assert step <= max(first, most_layers)
    layout = replace(LAYOUT, layers=layers)
    chunks = plan(layout, range(64), most_layers, layer_multiple=step)
    for each in steps:
        if step % each == 0:
            assert follows(each, [layers], chunks)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, True), (2, True), (3, False), (4, False), (7, False)]
)
def test_who_can_code_a_plan(step: int, expected: bool) -> None:
    """Groups of a strategy's layers must not be cut by chunks; the model's last may be short."""
    chunks = plan(LAYOUT, range(64), 2, layer_multiple=2)
    assert follows(step, [LAYOUT.layers], chunks) is expected


rates = st.floats(1e3, 1e11)


@given(
    st.lists(st.sampled_from(list(RATIOS)), min_size=1, unique=True),
    st.sampled_from(list(Goal)),
    st.floats(1e-3, 10.0),
    st.floats(0.0, 20.0),
    st.sampled_from(list(RATIOS)),
    st.sets(st.sampled_from(list(RATIOS))),
    st.sets(st.sampled_from(sorted(known_stages()))),
    rates,
    st.integers(1, 1 << 32),
    st.floats(1e6, 1e11),
)
def test_no_hard_constraint_is_broken_midway(
    names: list[str],
    goal: Goal,
    deadline_s: float,
    spent_s: float,
    before: str,
    able: set[str],
    lacking: set[str],
    bytes_per_s: float,
    native_bytes: int,
    codec_bytes_per_s: float,
) -> None:
    """Whatever the rest is coded by is in the class's budget, can be decoded by the peer and fits the plan."""
    costs = StageCost(bytes_per_s=codec_bytes_per_s)
    candidates = {name: candidate(name, encode=costs, decode=costs) for name in RATIOS}
    rule = ClassRule(goal=goal, candidates=tuple(names), deadline_s=deadline_s)
    made = table(candidates=candidates, rules={"default": rule})
    selector = Selector()
    ready = ReadyTable.of(made)
    selector.install(ready)
    fitting = {ready.pipelines[name].digest for name in able | {"none"}}
    stages = known_stages() - lacking
    found = selector.choose_rest(
        "default",
        before=choice(before),
        before_bytes_per_s=FAST,
        native_bytes=native_bytes,
        link=Link(bytes_per_s=bytes_per_s),
        chunks=3,
        follows=lambda pipeline: pipeline.digest in fitting,
        spent_s=spent_s,
        stages=stages,
    )
    if found is None:
        return
    name = found.selection.profile
    assert name != before
    assert found.pipeline.digest in fitting
    if name == "none":
        # what everyone can decode stands in where nothing else is left
        assert "none" in names or not any(
            stages.issuperset(ready.pipelines[each].stage_ids) for each in names
        )
        return
    assert name in names
    assert stages.issuperset(found.pipeline.stage_ids)
    assert candidates[name].loss_upper_bp <= max(candidates[each].loss_upper_bp for each in names)
