"""The table in force, and what it chooses."""

from pathlib import Path

import pytest

from kv_loopback import ENGINE, LAYOUT
from kvserve_api.errors import StrategyError
from kvserve_api.latency import Link
from kvserve_api.policy import Goal, Mode
from kvserve_api.selection import Bound, Selection
from kvserve_api.strategy import Kind, Part, StageConfig, StrategyConfig
from kvserve_api.table import ClassRule, DecisionTable, Doubt, OnControllerLoss, Version
from kvserve_connector.coding import known_stages, raw_pipeline
from kvserve_connector.ready import ReadyTable
from kvserve_connector.selector import DEFAULT_BYTES_PER_S, Choice, Selector
from kvserve_strategies import Pipeline
from random_bundles import joint_strategy, write_sample
from tables import candidate, table

MB = 1e6
FAST, SLOW = Link(bytes_per_s=1e10), Link(bytes_per_s=1e6)


class Clock:
    """A clock that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def choose(selector: Selector, link: Link = SLOW, stages: frozenset[str] | None = None) -> Choice:
    """Choose for a transfer of 10 MB."""
    return selector.choose(
        "default",
        native_bytes=10_000_000,
        link=link,
        chunks=6,
        stages=known_stages() if stages is None else stages,
    )


def in_force(made: DecisionTable) -> Selector:
    """Return a selector with a table."""
    selector = Selector()
    selector.install(ReadyTable.of(made))
    return selector


def test_opaque_caches_go_without_loss() -> None:
    """What may not code the cache is never chosen nor built, and a pin that it can't be is said to be why."""

    def lossless(pipeline: Pipeline) -> bool:
        return pipeline.lossless

    names = ("none", "lossless", "int4-token")
    for pinned, profile, bound in (
        (None, "lossless", Bound.GOAL),
        ("int4-token", "none", Bound.OPAQUE),
        ("lossless", "lossless", Bound.PINNED),
    ):
        ready = ReadyTable.of(table(*names, pinned=pinned), carries=lossless)
        assert set(ready.pipelines) == {"none", "lossless"}
        selector = Selector()
        selector.install(ready)
        selection = choose(selector).selection
        assert (selection.profile, selection.bound) == (profile, bound)
        assert selection.wanted == (pinned or profile)


def test_no_table_means_raw() -> None:
    """Without a table everything is sent as it is, and the link's prior is 1 Gbit/s."""
    selector = Selector()
    choice = choose(selector)
    assert (choice.selection.profile, choice.selection.bound) == ("none", Bound.NO_TABLE)
    assert choice.pipeline is raw_pipeline()
    assert choice.version is None
    assert selector.prior_bytes_per_s == DEFAULT_BYTES_PER_S


def test_choice_follows_link_and_backlog() -> None:
    """A fast link goes raw, a slow one or one with a queue ahead takes the highest ratio."""
    selector = in_force(table())
    assert choose(selector, FAST).selection.profile == "none"
    assert choose(selector, SLOW).selection.profile == "int4-token"
    assert choose(selector, SLOW).ratio == 3.6
    assert choose(selector, SLOW).version == Version(epoch=1, counter=1)


def test_renewal_and_expiry() -> None:
    """A table that was not renewed in time reverts to its fallback if it says so; a renewal of its version counts."""
    clock = Clock()
    selector = Selector(clock)
    made = table(on_controller_loss=OnControllerLoss.REVERT, ttl_s=10.0)
    selector.install(ReadyTable.of(made))
    clock.now_s = 9.0
    selector.renew(Version(epoch=1, counter=7))
    clock.now_s = 10.5
    assert selector.age_s == 10.5
    assert choose(selector).selection.bound == Bound.EXPIRED
    assert choose(selector).selection.profile == "none"
    selector.renew(made.version)
    assert choose(selector).selection.profile == "int4-token"


def test_last_good_holds() -> None:
    """A table that says so holds however long its controller is silent."""
    clock = Clock()
    selector = Selector(clock)
    selector.install(ReadyTable.of(table(ttl_s=1.0)))
    clock.now_s = 1e6
    assert choose(selector).selection.profile == "int4-token"


def test_consumer_without_the_stages_gets_what_it_can_decode() -> None:
    """Candidates that the consumer can't decode are no candidates; a pinned one gives way to raw, and that is said."""
    raw_only = frozenset(raw_pipeline().stage_ids)
    able = raw_only | frozenset(ReadyTable.of(table()).pipelines["int8-token"].stage_ids)
    selector = in_force(table())
    assert choose(selector, SLOW, raw_only).selection.profile == "none"
    assert choose(selector, SLOW, able).selection.profile in {"int8-token", "int4-token"}
    pinned = choose(in_force(table(pinned="lossless")), SLOW, raw_only).selection
    assert (pinned.profile, pinned.wanted, pinned.bound) == ("none", "lossless", Bound.PEER)
    assert choose(in_force(table(pinned="lossless"))).selection.profile == "lossless"


def test_shadow_mode_only_says_what_it_would_do() -> None:
    """In mode Shadow the transfer is raw and the wanted profile is reported."""
    selection = choose(in_force(table(mode=Mode.SHADOW))).selection
    assert (selection.profile, selection.wanted) == ("none", "int4-token")


def test_dropped_table_means_raw() -> None:
    """A pod that no policy wants sends raw again."""
    selector = in_force(table())
    selector.drop()
    assert selector.table is None
    assert choose(selector).selection.bound == Bound.NO_TABLE


def test_unbuildable_tables_are_refused_whole() -> None:
    """A strategy with an unknown stage, or a calibrated one without a bundle, makes the table unusable here."""
    unknown = StrategyConfig(
        parts=tuple(Part(kind=kind, chain=(StageConfig(id="code.magic.v1"),)) for kind in Kind)
    )
    candidates = {
        "none": candidate("none"),
        "int8-token": candidate("int8-token", strategy=unknown),
    }
    with pytest.raises(StrategyError, match=r"code\.magic\.v1"):
        ReadyTable.of(table(*candidates, candidates=candidates))
    joint = candidate("int4-token", strategy=joint_strategy(), bundle=None)
    candidates = {"none": candidate("none"), "int4-token": joint}
    with pytest.raises(StrategyError, match="calibration bundle"):
        ReadyTable.of(table(*candidates, candidates=candidates))


def test_consumer_without_the_bundle_gets_what_it_can_decode(tmp_path: Path) -> None:
    """A calibrated candidate is one only for consumers that said they have its very bundle."""
    bundle = write_sample(tmp_path / "b", LAYOUT, ENGINE.fingerprint)
    joint = candidate("int4-token", strategy=joint_strategy(), bundle=bundle.digest)
    made = table(candidates=table().candidates | {"int4-token": joint})
    selector = Selector()
    selector.install(ReadyTable.of(made, {bundle.digest: bundle}))

    def chosen(*bundles: str) -> Choice:
        return selector.choose(
            "default",
            native_bytes=10_000_000,
            link=SLOW,
            chunks=6,
            stages=known_stages(),
            bundles=frozenset(bundles),
        )

    assert chosen().selection.profile == "int8-token"
    assert chosen("sha256:" + "1" * 64).selection.profile == "int8-token"
    choice = chosen("sha256:" + "1" * 64, bundle.digest)
    assert choice.selection.profile == "int4-token"
    assert choice.pipeline.bundle is bundle


def test_tries_out_for_its_share_of_the_time() -> None:
    """What could be better is tried while that may cost two in a hundred of the time, at once, and repeatably."""
    rule = ClassRule(
        goal=Goal.MINIMIZE_LATENCY, candidates=("none", "int8-token"), explore_share=0.02
    )
    unsure = table(
        "none",
        "int8-token",
        rules={"default": rule},
        candidates={
            "none": candidate("none"),
            "int8-token": candidate("int8-token", doubt=Doubt(encode=0.7, decode=0.7)),
        },
    )
    link = Link(bytes_per_s=1e9)
    tries = []
    for _ in range(2):
        selector = in_force(unsure)
        tries.append([choose(selector, link).selection for _ in range(1000)])
    assert tries[0] == tries[1]
    turns = [n for n, each in enumerate(tries[0]) if each.bound is Bound.EXPLORED]
    usual_s = next(each.predicted_s for each in tries[0] if each.bound is Bound.GOAL)
    spent_s = sum(each.extra_s for each in tries[0])
    assert 0.018 * 1000 * usual_s < spent_s <= 0.02 * 1050 * usual_s
    assert turns[:3] == [3, 7, 11]
    assert {each.profile for each in tries[0] if each.bound is not Bound.EXPLORED} == {"none"}


def test_what_is_in_use_is_kept_for_each_consumer() -> None:
    """A profile stays in use for the consumer it is in use for; what was explored does not come into use."""
    sticky = table("none", "int8-token", hysteresis=0.2)
    selector = in_force(sticky)
    fast, near = Link(bytes_per_s=1e9), Link(bytes_per_s=2.2e8)

    def chosen(peer: str, link: Link) -> Selection:
        return selector.choose(
            "default",
            native_bytes=10_000_000,
            link=link,
            chunks=1,
            stages=known_stages(),
            peer=peer,
        ).selection

    assert chosen("a", fast).profile == "none"
    assert (chosen("a", near).profile, chosen("a", near).bound) == ("none", Bound.KEPT)
    assert (chosen("b", near).profile, chosen("b", near).bound) == ("int8-token", Bound.GOAL)


def test_margins_follow_the_candidates_of_a_consumer() -> None:
    """A consumer that can't decode a candidate with a margin has a table without both."""
    raw_only = frozenset(raw_pipeline().stage_ids)
    rule = ClassRule(
        goal=Goal.MINIMIZE_LATENCY,
        candidates=("none", "int8-token"),
        deadline_s=1.0,
        margins={"int8-token": 1.5, "none": 1.1},
    )
    ready = ReadyTable.of(table(rules={"default": rule}))
    assert ready.decodable(raw_only, frozenset()).rules["default"].margins == {"none": 1.1}
