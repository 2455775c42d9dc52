"""A timer that is moved only to go off sooner."""

import asyncio

import pytest

from kvserve_controller.alarm import Alarm


@pytest.mark.parametrize(
    ("delays_s", "most_s"),
    [
        pytest.param([60.0, 0.01], 1.0, id="sooner"),
        pytest.param([0.01, 60.0], 1.0, id="not-later"),
        pytest.param([0.01, None], 1.0, id="nor-never"),
    ],
)
async def test_rings_at_the_earliest_time(delays_s: list[float | None], most_s: float) -> None:
    """It goes off when the shortest of its delays is over, once, and can then be set to any time."""
    rings: list[float] = []
    rung = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ring() -> None:
        rings.append(loop.time())
        rung.set()

    alarm = Alarm(ring)
    began_s = loop.time()
    for delay_s in delays_s:
        alarm.set(delay_s)
    await asyncio.wait_for(rung.wait(), most_s)
    assert rings[0] - began_s >= 0.01 - 1e-3
    rung.clear()
    alarm.set(0.02)
    await asyncio.wait_for(rung.wait(), most_s)
    assert len(rings) == 2


async def test_stopped_it_is_silent() -> None:
    """It does not go off once it was stopped, or never set."""
    rings: list[None] = []
    alarm = Alarm(lambda: rings.append(None))
    alarm.set(None)
    alarm.set(0.01)
    alarm.stop()
    await asyncio.sleep(0.03)
    assert rings == []
