"""What a link or a coder was asked for lately."""

import pytest

from kvserve_api.latency import NO_LOAD
from kvserve_connector.loads import MEMORY_S, Arrivals


def test_steady_arrivals_are_their_rate() -> None:
    """Two transfers a second of 10 MB are a load of two a second and 20 MB/s, half of it for each of two coders."""
    arrivals = Arrivals(0.0)
    for index in range(400):
        arrivals.add(index / 2, 10_000_000)
    load = arrivals.load(200.0)
    assert load.arrivals_per_s == pytest.approx(2.0, rel=0.05)
    assert load.native_bytes_per_s == pytest.approx(2e7, rel=0.05)
    assert arrivals.load(200.0, share=0.5).arrivals_per_s == pytest.approx(1.0, rel=0.05)


def test_silence_is_no_load() -> None:
    """A single transfer is no load, and arrivals are forgotten."""
    arrivals = Arrivals(0.0)
    assert arrivals.load(0.0) == NO_LOAD
    arrivals.add(1.0, 1 << 40)
    assert arrivals.load(1.0) == NO_LOAD
    for _ in range(50):
        arrivals.add(2.0, 1 << 20)
    assert arrivals.load(2.0).arrivals_per_s > 3
    assert arrivals.load(2.0 + 10 * MEMORY_S) == NO_LOAD


def test_clock_that_goes_back_counts_on() -> None:
    """Threads may read the clock in another order than they count: no weight is ever above one."""
    arrivals = Arrivals(10.0)
    for _ in range(30):
        arrivals.add(10.0, 1)
        arrivals.add(5.0, 1)
    assert arrivals.load(10.0).arrivals_per_s == pytest.approx(60 / MEMORY_S)
