"""The latency model."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.latency import Link, Load, StageCost, pipeline_s, predict

seconds = st.floats(0, 1e3)
speeds = st.floats(1, 1e12)
sizes = st.integers(0, 1 << 40)


def test_worked_example() -> None:
    """100 MB at ratio 4 over 50 MB/s behind 10 MB: encoding overlaps the wait, the wire doesn't; then pipelined."""
    cost = StageCost(bytes_per_s=1e9)
    link = Link(bytes_per_s=50e6, backlog_bytes=10e6, rtt_s=0.01)
    one = predict(native_bytes=100e6, ratio=4, encode=cost, decode=cost, link=link)
    assert (one.encode_s, one.wire_s, one.decode_s) == pytest.approx((0.1, 0.5, 0.1))
    assert one.total_s == pytest.approx(0.01 + 0.2 + 0.5 + 0.1)
    assert one.wait_s == pytest.approx(0.01 + 0.2 - 0.1)
    ten = predict(native_bytes=100e6, ratio=4, encode=cost, decode=cost, link=link, chunks=10)
    assert ten.total_s == pytest.approx(0.21 + (0.6 + 9 * 0.5) / 10)


@given(
    st.tuples(*[st.floats(1e-3, 10)] * 3), st.tuples(*[st.floats(0, 100)] * 3), st.integers(1, 40)
)
def test_is_a_flow_shop(
    stages_s: tuple[float, float, float], waits_s: tuple[float, float, float], chunks: int
) -> None:
    """The formula is what a line of three stages takes, each busy until a time of its own, chunk after chunk."""
    free_s = list(waits_s)
    for _ in range(chunks):
        done_s = 0.0
        for stage, stage_s in enumerate(stages_s):
            done_s = free_s[stage] = max(free_s[stage], done_s) + stage_s / chunks
    predicted = predict(
        native_bytes=1.0,
        ratio=1.0,
        encode=StageCost(offset_s=stages_s[0]),
        decode=StageCost(offset_s=stages_s[2]),
        link=Link(
            bytes_per_s=1 / stages_s[1],
            backlog_bytes=waits_s[1] / stages_s[1],
            encode_backlog_s=waits_s[0],
            decode_backlog_s=waits_s[2],
        ),
        chunks=chunks,
    )
    assert predicted.total_s == pytest.approx(free_s[2])


def test_delay_to_others() -> None:
    """A transfer of 1 s behind 2 s: 0.5 arrivals/s wait 1 s more for 3 s, however full the stage would be."""
    free = StageCost()
    load = Load(arrivals_per_s=0.5, native_bytes_per_s=5e5)
    link = Link(bytes_per_s=1e6, backlog_bytes=2e6, load=load)
    one = predict(native_bytes=1e6, ratio=1, encode=free, decode=free, link=link)
    assert one.utilisation == pytest.approx(0.5)
    assert one.others_s == pytest.approx(0.5 * 1.0 * (2.0 + 1.0))
    full = replace(link, load=Load(arrivals_per_s=1.0, native_bytes_per_s=1e6))
    endless = predict(native_bytes=1e6, ratio=1, encode=free, decode=free, link=full)
    assert endless.utilisation == pytest.approx(1.0)
    assert endless.others_s == pytest.approx(1.0 * (2.0 + 1.0))


def test_coding_costs_what_engines_compute() -> None:
    """Of 3 requests here and 1 there that wait for coders, 2 s of encoding and 0.5 s of decoding take 6.5 s."""
    alone = Link(bytes_per_s=1e6)
    beside, by_itself = (
        predict(
            native_bytes=1e6,
            ratio=1,
            encode=StageCost(offset_s=2.0),
            decode=StageCost(offset_s=0.5),
            link=link,
        )
        for link in (replace(alone, encode_delays=3.0, decode_delays=1.0), alone)
    )
    assert beside.others_s == pytest.approx(6.5)
    assert beside.total_s == by_itself.total_s


@given(st.tuples(seconds, seconds, seconds), st.integers(1, 1000))
def test_pipeline_bounds(stages_s: tuple[float, ...], chunks: int) -> None:
    """Overlap takes at least the slowest stage and at most all of them; more chunks are never slower."""
    total_s = pipeline_s(stages_s, chunks)
    slack = 1e-9 * (1 + sum(stages_s))
    assert max(stages_s) - slack <= total_s <= sum(stages_s) + slack
    assert pipeline_s(stages_s, chunks + 1) <= total_s + slack
    assert pipeline_s(stages_s, 1) == pytest.approx(sum(stages_s))


@given(sizes, sizes, speeds, speeds, st.floats(1, 100), st.floats(1, 100), st.integers(1, 64))
def test_monotone(
    small: int, large: int, slow: float, fast: float, low: float, high: float, chunks: int
) -> None:
    """More bytes take no less time; a faster link or a larger ratio takes no more."""
    small, large = sorted((small, large))
    slow, fast = sorted((slow, fast))
    low, high = sorted((low, high))
    cost = StageCost(floor_s=1e-4, offset_s=1e-3, bytes_per_s=1e9)

    def total_s(size: int, speed: float, ratio: float) -> float:
        link = Link(bytes_per_s=speed, backlog_bytes=1e6)
        return predict(
            native_bytes=size, ratio=ratio, encode=cost, decode=cost, link=link, chunks=chunks
        ).total_s

    most_s = total_s(large, slow, low) * (1 + 1e-12)
    assert total_s(small, slow, low) <= most_s
    assert total_s(large, fast, low) <= most_s
    assert total_s(large, slow, high) <= most_s


def test_backlog_waits() -> None:
    """Bytes queued ahead delay a transfer by their time on the link."""
    free = StageCost()
    times_s = [
        predict(
            native_bytes=1e6,
            ratio=1,
            encode=free,
            decode=free,
            link=Link(bytes_per_s=1e6, backlog_bytes=backlog),
        ).total_s
        for backlog in (0, 5e6)
    ]
    assert times_s == pytest.approx([1.0, 6.0])


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1, 1e15) | st.just(math.inf))
def test_cost_round_trip(floor_s: float, offset_s: float, bytes_per_s: float) -> None:
    """A cost survives JSON, an infinite speed too."""
    cost = StageCost(floor_s=floor_s, offset_s=offset_s, bytes_per_s=bytes_per_s)
    assert StageCost.from_json(Fields(cost.to_json())) == cost


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
def test_link_refuses_nonsense(bad: float) -> None:
    """NaN, negative and infinite values are no link."""
    waits = ("backlog_bytes", "rtt_s", "encode_backlog_s", "decode_backlog_s")
    for field in ("bytes_per_s", *waits):
        with pytest.raises(SpecError, match=field):
            replace(Link(bytes_per_s=1.0), **{field: bad})  # type: ignore[arg-type]
    for field in ("arrivals_per_s", "native_bytes_per_s"):
        with pytest.raises(SpecError, match=field):
            Load(**{field: bad})


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_cost_refuses_nonsense(bad: float) -> None:
    """NaN and negative values are no cost."""
    for field in ("floor_s", "offset_s", "bytes_per_s"):
        with pytest.raises(SpecError, match=field):
            StageCost(**{field: bad})
