"""Learning from transfer reports, none of which is trusted."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.profile_set import Profile
from kvserve_api.table import Doubt
from kvserve_controller.belief import HALF_LIFE_S
from kvserve_controller.learn import MAX_MACHINES, MOST, Correction, Learner, distance
from kvserve_controller.report import Report, ReportError
from podclient import transfer_report
from samples import INT4, INT8, RAW

SIZE = 100_000_000


def report(
    profile: Profile = INT4,
    *,
    encode: float = 1.0,
    decode: float = 1.0,
    wire: float = 1.0,
    producer: str = "prefill-0",
) -> Report:
    """Return the report of a transfer that many times slower or larger than profiled."""
    return Report.read(
        transfer_report(
            profile.name,
            native_bytes=SIZE,
            wire_bytes=int(SIZE / profile.ratio * wire),
            encode_s=profile.encode.seconds(SIZE) * encode,
            decode_s=profile.decode.seconds(SIZE) * decode,
            producer=producer,
        )
    )


def taught(*reports: Report) -> Learner:
    """Return what has seen some reports of INT4."""
    learner = Learner()
    for one in reports:
        learner.observe(INT4, one, "decode-0")
    return learner


def after(*reports: Report) -> Correction:
    """Return the correction of INT4 after some reports."""
    return taught(*reports).corrections(["int4"])["int4"]


def test_converges_to_the_truth() -> None:
    """After many transfers the corrections are what the profile was off by, and are sure."""
    learned = after(*[report(encode=2.0, decode=0.5, wire=1.25)] * 100)
    assert learned.encode == pytest.approx(2.0, rel=0.03)
    assert learned.decode == pytest.approx(0.5, rel=0.03)
    assert learned.wire == pytest.approx(1.25, rel=0.03)
    assert max(learned.doubt.encode, learned.doubt.decode, learned.doubt.wire) < 0.05


def test_starts_at_the_profile() -> None:
    """Before any transfer a profile is believed, but not firmly; one transfer moves it part of the way."""
    first = Learner().corrections(["int4"])["int4"]
    assert (first.encode, first.decode, first.wire) == (1.0, 1.0, 1.0)
    assert first.doubt.encode > 0.3
    learned = after(report(encode=2.0))
    assert 1.3 < learned.encode < 1.8
    assert learned.decode == pytest.approx(1.0, rel=1e-6)
    assert learned.doubt.encode < first.doubt.encode


def test_slow_machine_corrects_profiles_it_has_not_used() -> None:
    """A machine three times slower makes every codec slow at once; a profile used there before keeps its own part."""
    learner = taught(*[report(encode=3.0)] * 30)
    learned = learner.corrections(["int4", "int8", "rans"])
    assert learned["int4"].encode == pytest.approx(3.0, rel=0.05)
    assert learned["int8"] == learned["rans"]
    assert 1.8 < learned["int8"].encode < 3.0
    assert learned["int8"].doubt.encode > learned["int4"].doubt.encode
    assert learned["int8"].decode == pytest.approx(1.0, abs=0.02)


def test_machines_are_told_apart() -> None:
    """Of two producers the slow one is known to be, and the corrections are for one between them."""
    learner = Learner()
    for _ in range(100):
        learner.observe(INT4, report(encode=1.0, producer="quick"), "d")
        learner.observe(INT4, report(encode=2.0, producer="slow"), "d")
    machines = learner.machines("encode")
    assert machines["slow"] / machines["quick"] == pytest.approx(2.0, rel=0.1)
    assert 1.2 < learner.corrections(["int4"])["int4"].encode < 1.7


def test_copying_teaches_nothing_of_coding() -> None:
    """Raw transfers that take long to copy leave what is believed of the codecs as it was."""
    learner = Learner()
    for _ in range(100):
        learner.observe(RAW, report(RAW, encode=5.0, decode=5.0), "d")
    learned = learner.corrections(["none", "int4"])
    assert learned["none"].encode > 2.0
    assert (learned["int4"].encode, learned["int4"].decode) == (1.0, 1.0)


def test_change_is_believed_within_a_few_transfers() -> None:
    """A codec that becomes four times slower counts as such after five transfers, however long it was fast."""
    usual = [report(encode=factor) for factor in (0.95, 1.0, 1.05)] * 100
    learner = taught(*usual, *[report(encode=4.0)] * 5)
    assert learner.corrections(["int4"])["int4"].encode > 3.0
    assert learner.changes == {"encode": 1, "decode": 0, "wire": 0}


def test_an_outlier_does_not_rule() -> None:
    """One or two absurdly slow transfers among usual ones change a correction by less than a tenth."""
    usual = [report(encode=factor) for factor in (0.95, 1.0, 1.05)] * 10
    assert after(*usual, report(encode=50.0)).encode < 1.1
    assert after(*usual, *[report(encode=50.0)] * 2, *usual[:3]).encode < 1.1


def test_unused_profile_gets_another_chance() -> None:
    """A correction that no transfer confirms fades, so that a codec slow for a while is tried again."""
    learner = taught(*[report(encode=4.0)] * 50)
    fresh = learner.corrections(["int4"])["int4"]
    learner.age(HALF_LIFE_S)
    half = learner.corrections(["int4"])["int4"]
    learner.age(20 * HALF_LIFE_S)
    last = learner.corrections(["int4"])["int4"]
    assert fresh.encode > half.encode > 1.5
    assert half.doubt.encode > fresh.doubt.encode
    assert last.encode == pytest.approx(1.0, abs=0.01)
    assert last.doubt.encode == pytest.approx(
        Learner().corrections(["int4"])["int4"].doubt.encode, rel=0.01
    )


@given(
    st.lists(
        st.tuples(*[st.floats(0, 3600)] * 3, st.integers(1, 1 << 44), st.integers(1, 1 << 44)),
        max_size=30,
    )
)
def test_corrections_stay_bounded(values: list[tuple[float, float, float, int, int]]) -> None:
    """Whatever passes as a report, corrections and doubts stay finite and within their limits."""
    learner = Learner()
    for encode_s, decode_s, total_s, native, wire in values:
        message = transfer_report(
            "int4",
            encode_s=encode_s,
            decode_s=decode_s,
            total_s=total_s,
            native_bytes=native,
            wire_bytes=min(wire, native),
        )
        learner.observe(INT4, Report.read(message))
    for correction in learner.corrections(["int4", "rans"]).values():
        for value in (correction.encode, correction.decode, correction.wire):
            assert 1 / MOST <= value <= MOST
        assert 0 <= correction.doubt.encode < 1
    assert Learner.from_json(Fields(learner.to_json())).to_json() == learner.to_json()


def test_machines_are_bounded() -> None:
    """Of more machines than are remembered, those seen last are."""
    learner = Learner()
    slow = report(encode=2.0)
    for index in range(MAX_MACHINES + 200):
        learner._measure("encode", "int4", f"p{index}", 0.5)
        learner._measure("decode", "int4", f"d{index}", 0.5)
    learner.observe(INT4, slow, "d0")
    known = learner.machines("encode")
    assert len(known) <= 2 * MAX_MACHINES
    assert "p0" not in known
    assert f"p{MAX_MACHINES + 199}" in known


def test_learned_state_survives() -> None:
    """What was learned is the same after JSON, rounding aside, and goes on from there."""
    learner = taught(*[report(encode=3.0, wire=1.1)] * 20)
    again = Learner.from_json(Fields(learner.to_json()))
    for name, correction in learner.corrections(["int4", "rans"]).items():
        restored = again.corrections([name])[name]
        assert restored.encode == pytest.approx(correction.encode, rel=1e-4)
        assert restored.doubt.wire == pytest.approx(correction.doubt.wire, rel=1e-3)
    again.observe(INT8, report(INT8), "decode-0")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"shared": {}}, id="no-shared"),
        pytest.param({"profiles": {"brew": {"int4": [0, 1]}}}, id="stage"),
        pytest.param({"profiles": {"encode": {"int4": [math.nan, 1]}}}, id="nan"),
        pytest.param({"profiles": {"encode": {"int4": [0.0, -1.0]}}}, id="negative-variance"),
        pytest.param({"profiles": {"encode": {"int4": [99.0, 0.1]}}}, id="absurd"),
        pytest.param({"machines": {"encode": {"p": [0.0]}}}, id="short"),
        pytest.param({"noise": {"encode": {"p": "x"}}}, id="text"),
        pytest.param({"more": 1}, id="unknown-key"),
    ],
)
def test_damaged_state_is_refused(change: dict[str, Any]) -> None:
    """State that can't be what was written is a typed error."""
    with pytest.raises(SpecError):
        Learner.from_json(Fields(taught(report()).to_json() | change))


def test_free_profile_has_no_time_to_correct() -> None:
    """Raw transfers, of which nothing is coded, teach without a division by zero."""
    learner = Learner()
    learner.observe(RAW, Report.read(transfer_report("none", encode_s=0.0, decode_s=0.0)))
    assert learner.corrections(["none"])["none"].wire == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"encode_s": math.nan}, "NotFinite", id="nan"),
        pytest.param({"total_s": math.inf}, "NotFinite", id="infinite"),
        pytest.param({"decode_s": -1e-9}, "Negative", id="negative"),
        pytest.param({"model_s": 1e9}, "Absurd", id="years"),
        pytest.param({"goodput_bytes_per_s": math.nan}, "NotFinite", id="goodput"),
        pytest.param({"native_bytes": 0}, "Absurd", id="empty"),
        pytest.param({"native_bytes": 1 << 60}, "Absurd", id="exabyte"),
        pytest.param({"wire_bytes": 0}, "Absurd", id="nothing-sent"),
        pytest.param({"wire_bytes": 1 << 40}, "Absurd", id="expanded"),
        pytest.param({"workload": "x" * 64}, "Absurd", id="long-name"),
        pytest.param({"failure": "Timeout"}, "Failed", id="failed"),
        pytest.param({"predicted_s": math.nan}, "NotFinite", id="prediction"),
        pytest.param({"exposed_s": math.nan}, "NotFinite", id="exposed"),
        pytest.param({"exposed_s": 0.11}, "Absurd", id="more-exposed-than-there-is"),
        pytest.param({"producer": "x" * 300}, "Absurd", id="long-producer"),
    ],
)
def test_nonsense_teaches_nothing(fields: dict[str, Any], reason: str) -> None:
    """A report that is not finite, negative, absurd or of a failure is refused, with the reason to count."""
    with pytest.raises(ReportError) as caught:
        Report.read(transfer_report("int4", **fields))
    assert caught.value.reason == reason


def test_distance_is_the_largest_change() -> None:
    """Two sets of corrections are as far apart as their most changed factor or doubt, either way."""
    assert distance({}, {}) == 0
    assert distance({}, {"a": Correction(encode=1.1)}) == pytest.approx(0.1)
    assert distance({"a": Correction(wire=1.1)}, {}) == pytest.approx(0.1)
    assert distance(
        {"a": Correction(encode=2.0), "b": Correction(decode=4.0)},
        {"a": Correction(encode=2.0), "b": Correction(decode=5.0)},
    ) == pytest.approx(0.25)
    assert distance({}, {"a": Correction(doubt=Doubt(encode=0.2))}) > 0.2
