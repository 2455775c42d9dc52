"""Learning from transfer reports, none of which is trusted."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_controller.learn import HALF_LIFE_S, MOST, Correction, Learner, distance
from kvserve_controller.report import Report, ReportError
from podclient import transfer_report
from samples import INT4, RAW

SIZE = 100_000_000


def report(encode: float = 1.0, decode: float = 1.0, wire: float = 1.0) -> Report:
    """Return the report of a transfer by INT4, that many times slower or larger than profiled."""
    return Report.read(
        transfer_report(
            "int4",
            native_bytes=SIZE,
            wire_bytes=int(SIZE / INT4.ratio * wire),
            encode_s=INT4.encode.seconds(SIZE) * encode,
            decode_s=INT4.decode.seconds(SIZE) * decode,
        )
    )


def after(*reports: Report) -> Correction:
    """Return the correction of INT4 after some reports."""
    learner = Learner()
    for one in reports:
        learner.observe(INT4, one)
    return learner.corrections()["int4"]


def test_converges_to_the_truth() -> None:
    """After many transfers the corrections are what the profile was off by."""
    learned = after(*[report(encode=2.0, decode=0.5, wire=1.25)] * 200)
    assert learned.encode == pytest.approx(2.0, rel=0.08)
    assert learned.decode == pytest.approx(0.5, rel=0.08)
    assert learned.wire == pytest.approx(1.25, rel=0.03)


def test_shrinks_to_the_profile() -> None:
    """One transfer moves a correction by a fifth of the way, on a logarithmic scale."""
    learned = after(report(encode=2.0))
    assert learned.encode == pytest.approx(2.0**0.2, rel=0.01)
    assert learned.decode == pytest.approx(1.0, rel=1e-6)


def test_forgets() -> None:
    """A codec that becomes slow counts as slow after some fifty transfers, however long it was fast."""
    learned = after(*[report()] * 1000, *[report(encode=4.0)] * 100)
    assert learned.encode > 3.0


def test_unused_profile_gets_another_chance() -> None:
    """A correction that no transfer confirms fades, so that a codec slow for a while is tried again."""
    learner = Learner()
    for _ in range(50):
        learner.observe(INT4, report(encode=4.0))
    fresh = learner.corrections()["int4"].encode
    learner.age(HALF_LIFE_S)
    half = learner.corrections()["int4"].encode
    learner.age(20 * HALF_LIFE_S)
    assert fresh > half > 2.0
    assert learner.corrections()["int4"].encode == pytest.approx(1.0, abs=0.01)


def test_an_outlier_does_not_rule() -> None:
    """A single absurdly slow transfer among usual ones changes a correction by less than a fifth."""
    learned = after(*[report()] * 20, report(encode=1000.0), *[report()] * 5)
    assert learned.encode < 1.2


@given(
    st.lists(
        st.tuples(*[st.floats(0, 3600)] * 3, st.integers(1, 1 << 44), st.integers(1, 1 << 44)),
        max_size=30,
    )
)
def test_corrections_stay_bounded(values: list[tuple[float, float, float, int, int]]) -> None:
    """Whatever passes as a report, corrections stay finite and within their limits."""
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
    for correction in learner.corrections().values():
        for value in (correction.encode, correction.decode, correction.wire):
            assert 1 / MOST <= value <= MOST


def test_free_profile_has_no_time_to_correct() -> None:
    """Raw transfers, of which nothing is coded, teach without a division by zero."""
    learner = Learner()
    learner.observe(RAW, Report.read(transfer_report("none", encode_s=0.0, decode_s=0.0)))
    assert learner.corrections()["none"].wire == pytest.approx(1.0)


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
    ],
)
def test_nonsense_teaches_nothing(fields: dict[str, Any], reason: str) -> None:
    """A report that is not finite, negative, absurd or of a failure is refused, with the reason to count."""
    with pytest.raises(ReportError) as caught:
        Report.read(transfer_report("int4", **fields))
    assert caught.value.reason == reason


def test_distance_is_the_largest_change() -> None:
    """Two sets of corrections are as far apart as their most changed factor, either way."""
    assert distance({}, {}) == 0
    assert distance({}, {"a": Correction(encode=1.1)}) == pytest.approx(0.1)
    assert distance({"a": Correction(wire=1.1)}, {}) == pytest.approx(0.1)
    assert distance(
        {"a": Correction(encode=2.0), "b": Correction(decode=4.0)},
        {"a": Correction(encode=2.0), "b": Correction(decode=5.0)},
    ) == pytest.approx(0.25)
