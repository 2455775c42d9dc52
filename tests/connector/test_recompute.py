"""Fetching or computing is decided by what each takes, and the engine's speed is learned from its steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_connector.recompute import (
    LEAST_S,
    LEAST_TOKENS,
    RISK_S,
    Speed,
    Speedometer,
    Why,
    decide,
    looks_back,
)

SPEED = Speed(step_s=0.03, token_s=0.001, attention_s=2e-7)


@pytest.mark.parametrize(
    ("fetch_s", "measured", "speed", "fetch", "why", "limit_s"),
    [
        pytest.param(0.1, True, SPEED, True, Why.FETCH_FASTER, 2.4, id="faster"),
        pytest.param(0.1, False, SPEED, True, Why.UNMEASURED, 2.4, id="hoped"),
        pytest.param(2.5, True, SPEED, False, Why.RECOMPUTE_FASTER, 2.4, id="slower"),
        pytest.param(9.0, False, None, True, Why.UNMEASURED, RISK_S, id="nothing-known"),
    ],
)
def test_decide(
    fetch_s: float, measured: bool, speed: Speed | None, fetch: bool, why: Why, limit_s: float
) -> None:
    """The faster one is taken; a fetch may take as long as computing, or a fixed time before that is known."""
    verdict = decide(
        fetch_s=fetch_s, measured=measured, tokens=range(2000), speed=speed, most_s=30.0
    )
    assert (verdict.fetch, verdict.why) == (fetch, why)
    # 2,000 tokens and attention over half of them; the step's fixed part is not saved
    assert verdict.limit_s == pytest.approx(limit_s)


def test_limits() -> None:
    """No fetch is cut off within a scheduler's time, and none lasts longer than any may."""
    assert (
        decide(fetch_s=0.01, measured=True, tokens=range(64), speed=SPEED, most_s=30.0).limit_s
        == LEAST_S
    )
    for always in (False, True):
        verdict = decide(
            fetch_s=9.0,
            measured=True,
            tokens=range(64_000),
            speed=SPEED,
            most_s=7.0,
            always=always,
        )
        assert verdict.fetch
        assert verdict.limit_s == 7.0
    assert verdict.why == Why.ALWAYS


def test_what_attention_looks_back_on() -> None:
    """Computing a prompt in two parts looks back on as much as in one."""
    whole, first, rest = (looks_back(each) for each in (range(100), range(40), range(40, 100)))
    assert first + rest == whole == 5000


@given(
    step_ms=st.floats(0, 50),
    token_us=st.floats(50, 3000),
    attention_ns=st.floats(0, 500),
    chunks=st.lists(st.integers(100, 2000), min_size=4, max_size=12, unique=True),
)
def test_speed_is_learned(
    step_ms: float, token_us: float, attention_ns: float, chunks: list[int]
) -> None:
    """From steps of several lengths the engine's time for others between them is known."""
    true = Speed(step_s=step_ms / 1e3, token_s=token_us / 1e6, attention_s=attention_ns / 1e9)
    meter = Speedometer()
    for count in chunks:
        for start in (0, 700):
            part = range(start, start + count)
            meter.observe(true.seconds(part), [part])
    assert meter.speed is not None
    middle = range(500, 500 + sum(chunks) // len(chunks))
    assert meter.speed.seconds(middle) == pytest.approx(true.seconds(middle), rel=0.05)


def test_speed_follows_the_engine() -> None:
    """It is unknown at first, never negative, and after a change soon the new one."""
    meter = Speedometer()
    meter.observe(0.1, [range(LEAST_TOKENS - 1)])
    assert meter.speed is None
    for factor in (1, 5):
        for turn in range(200):
            part = range(turn % 7 * 100, turn % 7 * 100 + 200 + turn % 5 * 50)
            meter.observe(factor * SPEED.seconds(part), [part])
    assert meter.speed is not None
    assert min(meter.speed.step_s, meter.speed.token_s, meter.speed.attention_s) >= 0
    assert meter.speed.seconds(range(1000)) == pytest.approx(
        5 * SPEED.seconds(range(1000)), rel=0.1
    )


def test_a_step_that_took_no_time_teaches_nothing() -> None:
    """Clocks that stand still and empty steps are left out."""
    meter = Speedometer()
    meter.observe(0.0, [range(1000)])
    meter.observe(1.0, [])
    assert meter.speed is None
