"""One policy from its inputs to its table and status."""

import math
from typing import Any

import pytest

from kvserve_api.errors import ArtifactError, PolicyError
from kvserve_api.policy import Metric, Policy
from kvserve_api.table import Role, Version
from kvserve_controller.activity import Cause
from kvserve_controller.counts import Counts
from kvserve_controller.program import (
    RELEARN_INTERVAL_S,
    URGENT_INTERVAL_S,
    Instant,
    Program,
)
from kvserve_controller.source import Entry
from kvserve_controller.status import stamp, status
from kvserve_controller.versions import VersionClock
from podclient import transfer_report
from samples import INT4, RAW, pareto, policy_object

NOW = Instant(1000.0, 0.0)
SYNCED = {role: Counts(connected=1, synced=1) for role in Role}
TTFT = {"name": "ttft", "metric": "TimeToFirstToken", "thresholdMilliseconds": 500}


def entry(generation: int = 1, **spec: Any) -> Entry:
    """Return a policy with a set, as a source has it."""
    return Entry(
        policy=Policy.from_object(policy_object(**spec)), pareto=pareto(), generation=generation
    )


def program(first: Entry | None = None) -> Program:
    """Return a program that has taken up an entry."""
    made = Program("default/chat", prior_bytes_per_s=125e6, next_version=VersionClock(1.0).next)
    made.load(first or entry(), NOW)
    return made


def later(seconds: float) -> Instant:
    """Return a later moment."""
    return Instant(NOW.mono_s + seconds, NOW.wall_s + seconds)


def version(subject: Program) -> int:
    """Return the counter of the table in force."""
    assert subject.table is not None
    return subject.table.version.counter


def slow_reports(count: int = 20, factor: float = 4.0) -> list[Any]:
    """Return reports of an int4 that encodes so many times slower than profiled."""
    size = 100_000_000
    return [
        transfer_report(
            "int4",
            native_bytes=size,
            wire_bytes=int(size / 3.6),
            encode_s=factor * size / 1e9,
            decode_s=size / 1e9,
        )
    ] * count


def test_new_table_only_for_new_content() -> None:
    """A change that leads to the same table is not pushed; one that doesn't has the next version."""
    subject = program()
    assert version(subject) == 1
    assert subject.load(entry(generation=2), NOW) is None
    assert subject.load(entry(profiling={"suspend": True}), NOW) is None
    assert version(subject) == 1
    assert subject.load(entry(quality={"maxLossBasisPoints": 10}), NOW) is Cause.POLICY
    assert version(subject) == 2


def test_new_set_starts_learning_anew() -> None:
    """Another Pareto set makes a table of its own, free of corrections of the old one."""
    subject = program()
    subject.observe(slow_reports(), NOW)
    assert subject.tick(later(RELEARN_INTERVAL_S)) is Cause.LEARNED
    new = Entry(policy=subject.policy, pareto=pareto(INT4, RAW))
    assert subject.load(new, later(10)) is Cause.PROFILES
    assert subject.table is not None
    assert subject.table.candidates["int4"].encode == INT4.encode


def test_learned_table_is_rate_limited() -> None:
    """Corrections become a table when they moved enough; a large change soon, a small one after a longer while."""
    subject = program()
    assert subject.observe(slow_reports(), NOW) == {"Learned": 20}
    assert subject.tick(later(URGENT_INTERVAL_S - 0.1)) is None
    assert subject.tick(later(URGENT_INTERVAL_S)) is Cause.LEARNED
    assert subject.tick(later(2 * URGENT_INTERVAL_S)) is None
    assert version(subject) == 2
    little = program()
    little.observe(slow_reports(1, factor=1.3), NOW)
    assert little.tick(later(RELEARN_INTERVAL_S - 0.1)) is None
    assert little.tick(later(RELEARN_INTERVAL_S)) is Cause.LEARNED
    assert subject.table is not None
    assert subject.table.candidates["int4"].encode.seconds(1e9) > 2 * INT4.encode.seconds(1e9)


def test_mixed_transfers_count_and_teach_nothing() -> None:
    """What several profiles coded corrects none of them and no forecast, but is held against objectives."""
    move = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 500}
    subject = program(entry(slo={"objectives": [move]}))
    reports = slow_reports(factor=40.0)
    for report in reports:
        report.shares.update({"int4": 0.25, "none": 0.75})
        report.predicted_s, report.total_s = 0.1, 5.0
    assert subject.observe(reports, NOW) == {"Mixed": 20}
    assert subject.learned_from == 0
    taught, fresh = subject.saved, program().saved
    assert taught is not None
    assert fresh is not None
    assert taught.learner.to_json() == fresh.learner.to_json()
    assert taught.forecast.to_json() == fresh.forecast.to_json()
    assert subject.window.percentile_s("default", Metric.KV_TRANSFER_TIME, 95, NOW.mono_s) == 5.0


@pytest.mark.parametrize(
    ("mode", "loosened"), [pytest.param("Active", True), pytest.param("Shadow", False)]
)
def test_margins_loosen_where_few_are_late(mode: str, *, loosened: bool) -> None:
    """Transfers that keep an objective lower the percentile of margins, mixed ones too, if margins chose them."""
    objective = {
        "name": "t",
        "metric": "KVTransferTime",
        "percentile": 90,
        "thresholdMilliseconds": 9,
    }
    subject = program(entry(slo={"objectives": [objective]}, control={"mode": mode}))
    reports = [transfer_report("int4", total_s=0.008) for _ in range(200)]
    for report in reports[::2]:
        report.shares.update({"int4": 0.5, "none": 0.5})
    subject.observe(reports, NOW)
    subject.tick(later(60))
    (share,) = subject.learned.leeways.values()
    assert (share > 0) == loosened
    subject.observe([transfer_report("int4", total_s=1.0)] * 20, later(60))
    subject.tick(later(120))
    assert set(subject.learned.leeways.values()) == {0.0}


def test_model_time_becomes_the_deadline() -> None:
    """What the model was seen to take is left out of a transfer's share of the first token."""
    subject = program(entry(slo={"objectives": [TTFT]}))
    assert subject.table is not None
    assert subject.table.rules["default"].deadline_s == 0.25
    subject.observe([transfer_report("int4", model_s=0.1)] * 3, NOW)
    assert subject.tick(later(RELEARN_INTERVAL_S)) is Cause.LEARNED
    assert subject.table.rules["default"].deadline_s == pytest.approx(0.4)


def test_nonsense_is_counted_and_changes_nothing() -> None:
    """Reports that teach nothing are counted by reason and don't lead to a table."""
    subject = program()
    outcomes = subject.observe(
        [
            transfer_report("int4", encode_s=math.nan),
            transfer_report("int4", decode_s=-1.0),
            transfer_report("int4", wire_bytes=0),
            transfer_report("unheard-of"),
            transfer_report("int4", failure="PeerLost"),
            transfer_report("int4", shares={"int4": 2.0}),
        ],
        NOW,
    )
    assert outcomes == {
        "NotFinite": 1,
        "Negative": 1,
        "Absurd": 2,
        "UnknownProfile": 1,
        "Failed": 1,
    }
    assert subject.tick(later(100)) is None
    assert subject.observe([transfer_report("int4")] * 1005, NOW)["TooMany"] == 5


def test_bad_inputs_keep_the_last_good_table() -> None:
    """A policy or set that can't be used leaves the table as it is and says why, until it is mended."""
    subject = program()
    good = subject.table
    pinned = entry(generation=2, control={"mode": "Pinned", "pinnedProfile": "int5"})
    assert subject.load(pinned, NOW) is None
    assert isinstance(subject.problem, PolicyError)
    assert subject.load(Entry(policy=None, problem=PolicyError("spec", "broken")), NOW) is None
    assert str(subject.problem) == "spec: broken"
    corrupt = Entry(
        policy=entry().policy, pareto=None, problem=ArtifactError("configmap/x", "was changed")
    )
    subject.load(corrupt, NOW)
    assert str(subject.problem) == "configmap/x: was changed"
    assert subject.table == good
    subject.load(entry(generation=3), NOW)
    assert subject.problem is None
    assert subject.table == good


def test_reissue_only_changes_the_version() -> None:
    """A reissued table is the same decision under a higher version."""
    subject = program()
    before = subject.table
    assert subject.reissue() is Cause.REISSUED
    assert before is not None
    assert subject.table is not None
    assert subject.table.version > before.version
    assert subject.table.candidates == before.candidates


def condition(value: dict[str, Any], kind: str) -> tuple[str, str, str]:
    """Return status, reason and message of a condition."""
    found = next(c for c in value["conditions"] if c["type"] == kind)
    return found["status"], found["reason"], found["message"]


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        (Counts(connected=2, synced=2), ("True", "Acknowledged")),
        (Counts(connected=2, synced=1), ("Unknown", "Pending")),
        (Counts(connected=2, synced=1, rejected=1, message="d: x"), ("False", "Rejected")),
        (Counts(), ("False", "NotConnected")),
    ],
)
def test_programmed(decode: Counts, expected: tuple[str, str]) -> None:
    """Programmed is true only when every connected pod of both roles acknowledged the table."""
    counts = {Role.PREFILL: Counts(connected=1, synced=1), Role.DECODE: decode}
    assert condition(status(program(), counts, 0.0), "Programmed")[:2] == expected


def test_programmed_without_a_table() -> None:
    """Without a set, or with unusable inputs, Programmed says what is missing."""
    waiting = program(Entry(policy=entry().policy))
    assert condition(status(waiting, SYNCED, 0.0), "Programmed")[:2] == ("False", "NoProfiles")
    broken = program(Entry(policy=None, problem=PolicyError("spec.x", "is wrong"), generation=4))
    value = status(broken, SYNCED, 0.0)
    assert condition(value, "Programmed") == ("False", "InvalidPolicy", "spec.x: is wrong")
    assert {c["observedGeneration"] for c in value["conditions"]} == {4}
    assert "activeProfile" not in value


@pytest.mark.parametrize(
    ("spec", "remark"),
    [
        ({"control": {"mode": "Shadow"}}, "only reported"),
        ({"control": {"mode": "Off"}}, "stay uncompressed"),
        (
            {
                "control": {"mode": "Pinned", "pinnedProfile": "rans"},
                "quality": {"maxLossBasisPoints": 5},
            },
            r"'rans' exceeds the quality budget of workload class 'default' (80 > 5)",
        ),
    ],
)
def test_programmed_tells_what_not_to_expect(spec: dict[str, Any], remark: str) -> None:
    """A table that doesn't act, or exceeds the budget on purpose, says so."""
    value = status(program(entry(**spec)), SYNCED, 0.0)
    assert remark in condition(value, "Programmed")[2]


def test_active_profile() -> None:
    """The profile in use is published with version, ratio as transferred, and its loss limit rounded up."""
    subject = program(entry(control={"mode": "Pinned", "pinnedProfile": "rans"}))
    assert status(subject, SYNCED, 0.0)["activeProfile"] == {
        "name": "rans",
        "version": "1000.1",
        "since": "1970-01-01T00:00:00Z",
        "compressionRatio": "6.0x",
        "lossBasisPoints": 80,
    }


def test_switch_follows_traffic() -> None:
    """When a slower link makes most transfers use another profile, history says so."""
    subject = program()
    subject.observe([transfer_report("int4")] * 5, NOW)
    subject.tick(later(1))
    subject.observe([transfer_report("rans", goodput_bytes_per_s=6e6)] * 12, later(2))
    subject.tick(later(2))
    history = status(subject, SYNCED, 0.0)["history"]
    assert (history[0]["from"], history[0]["to"], history[0]["reason"]) == (
        "int4",
        "rans",
        "LinkSlower",
    )


def test_objectives() -> None:
    """Each objective has its observed percentile by class; one broken breaks the condition."""
    move = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 50}
    workloads = [{"name": "code", "slo": {"objectives": [move]}}]
    subject = program(entry(slo={"objectives": [TTFT]}, workloads=workloads))
    value = status(subject, SYNCED, NOW.mono_s)
    assert condition(value, "ObjectivesMet")[:2] == ("Unknown", "NoTraffic")
    subject.observe([transfer_report("int4", model_s=0.234, total_s=0.1)], NOW)
    value = status(subject, SYNCED, NOW.mono_s)
    assert value["objectives"] == [
        {
            "name": "ttft",
            "thresholdMilliseconds": 500,
            "windowSeconds": 300,
            "observedMilliseconds": 330,
            "met": True,
        },
        {"name": "code/move", "thresholdMilliseconds": 50, "windowSeconds": 300},
    ]
    assert condition(value, "ObjectivesMet")[:2] == ("True", "Met")
    subject.observe([transfer_report("int4", workload="code", total_s=0.1)], NOW)
    state, reason, message = condition(status(subject, SYNCED, NOW.mono_s), "ObjectivesMet")
    assert (state, reason) == ("False", "Breached")
    assert "code/move (100 > 50 ms)" in message
    assert condition(status(program(), SYNCED, 0.0), "ObjectivesMet")[:2] == (
        "True",
        "NoObjectives",
    )


@pytest.mark.parametrize(
    ("fields", "observed"),
    [
        pytest.param({}, {"ttft": 700, "move": 300}, id="said-nothing"),
        pytest.param({"exposed_s": 0.05}, {"ttft": 450, "move": 50}, id="mostly-hidden"),
        pytest.param({"exposed_s": 0.0}, {"ttft": 400, "move": 0}, id="all-hidden"),
    ],
)
def test_what_the_prefill_hid_is_counted_once(
    fields: dict[str, float], observed: dict[str, int]
) -> None:
    """Objectives count what a transfer took after its prefill's end; all of it if the pod does not tell them apart."""
    move = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 50}
    subject = program(entry(slo={"objectives": [TTFT, move]}))
    subject.observe([transfer_report("int4", model_s=0.4, total_s=0.3, **fields)], NOW)
    value = status(subject, SYNCED, NOW.mono_s)
    assert {o["name"]: o["observedMilliseconds"] for o in value["objectives"]} == observed


def test_transition_time_changes_with_the_answer() -> None:
    """A condition keeps its time while its answer is the same, whatever the message."""
    new = {"conditions": [{"type": "Programmed", "status": "True", "message": "new"}]}
    old = {
        "conditions": [
            {"type": "Programmed", "status": "True", "lastTransitionTime": "T1", "message": "old"}
        ]
    }
    assert stamp(new, old, "T2")["conditions"][0] == {
        "type": "Programmed",
        "status": "True",
        "message": "new",
        "lastTransitionTime": "T1",
    }
    old["conditions"][0]["status"] = "False"
    assert stamp(new, old, "T2")["conditions"][0]["lastTransitionTime"] == "T2"


def test_restart_takes_up_the_history() -> None:
    """A program that starts with a published status neither loses nor repeats the switch it tells."""
    subject = program()
    published = status(subject, SYNCED, 0.0)
    again = Program(
        "default/chat",
        prior_bytes_per_s=1e6,
        next_version=lambda: Version(epoch=9, counter=1),
    )
    again.restore(published)
    again.load(entry(), later(50))
    value = status(again, SYNCED, 0.0)
    assert value["history"] == published["history"]
    assert value["activeProfile"]["since"] == published["activeProfile"]["since"]
    assert value["activeProfile"]["version"] == "9.1"


def test_drift_is_told_when_it_is_sure() -> None:
    """A codec four times slower than profiled is a condition that says so; a few transfers or 20 % are none."""
    subject = program()
    assert condition(status(subject, SYNCED, 0.0), "ProfilesAccurate")[:2] == (
        "Unknown",
        "NoTraffic",
    )
    subject.observe(slow_reports(200, factor=1.2), NOW)
    assert condition(status(subject, SYNCED, 0.0), "ProfilesAccurate")[:2] == ("True", "Accurate")
    subject.observe(slow_reports(200), NOW)
    state, reason, message = condition(status(subject, SYNCED, 0.0), "ProfilesAccurate")
    assert (state, reason) == ("False", "Drifted")
    assert message.startswith("int4: time to encode 4.0x the profiled")


def test_class_at_risk_does_not_explore() -> None:
    """A class explores by its policy's share, and not while its objective is nearly or not kept."""
    move = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 500}
    subject = program(
        entry(slo={"objectives": [move]}, control={"exploration": {"maxBasisPoints": 300}})
    )
    assert subject.table is not None
    assert subject.table.rules["default"].explore_share == 0.03
    subject.observe([transfer_report("int4", total_s=0.46)] * 3, NOW)
    assert subject.tick(later(RELEARN_INTERVAL_S)) is Cause.LEARNED
    assert subject.table.rules["default"].explore_share == 0.0
    for mode in ({"mode": "Shadow"}, {"mode": "Pinned", "pinnedProfile": "int4"}, {"mode": "Off"}):
        fixed = program(entry(control=mode)).table
        assert fixed is not None
        assert fixed.rules["default"].explore_share == 0.0
