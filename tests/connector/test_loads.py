"""What a link or a coder was asked for lately."""

import math

import pytest

from kvserve_api.latency import NO_LOAD, StageCost
from kvserve_connector.loads import MEMORY_S, Arrivals, Coders, Credit, delays
from tables import candidate, table


def test_steady_arrivals_are_their_rate() -> None:
    """Two transfers a second of 10 MB are a load of two a second and 20 MB/s, half of it for each of two coders."""
    arrivals = Arrivals(0.0)
    for index in range(400):
        arrivals.add(index / 2, 10_000_000)
    load = arrivals.load(200.0)
    assert load.arrivals_per_s == pytest.approx(2.0, rel=0.05)
    assert load.native_bytes_per_s == pytest.approx(2e7, rel=0.05)
    assert arrivals.load(200.0, share=0.5).arrivals_per_s == pytest.approx(1.0, rel=0.05)


def test_a_coding_thread_takes_its_fair_share_of_the_processors() -> None:
    """Beside an engine on one processor a thread takes half of it from each request, on seven an eighth."""
    assert delays(1, 1.0) == 0.5
    assert delays(4, 7.0) == 0.5
    assert delays(3, math.inf) == 0.0


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


def test_slower_coder_is_noticed_within_a_few_transfers() -> None:
    """A coder that becomes four times slower is known to be within three transfers of six chunks, and recovers."""
    coders = Coders(1, 0.0)
    for _ in range(18):
        coders.observe(4 * 0.6 / 6, 0.6, 1 / 6)
    assert coders.factor == pytest.approx(4.0, rel=0.3)
    for _ in range(60):
        coders.observe(0.6 / 6, 0.6, 1 / 6)
    assert coders.factor == pytest.approx(1.0, rel=0.05)


def test_one_slow_piece_does_not_rule() -> None:
    """A single chunk a hundred times slower changes the factor by less than an eighth, and nonsense by nothing."""
    coders = Coders(1, 0.0)
    coders.observe(10.0, 0.6, 1 / 6)
    assert coders.factor < 1.125
    before = coders.factor
    coders.observe(math.nan, 0.6, 1 / 6)
    coders.observe(-1.0, 0.6, 1 / 6)
    assert coders.factor == before


def test_new_table_takes_over_what_was_seen() -> None:
    """A table that says itself that encoding is twice as slow leaves half of the factor; no table, none."""
    coders = Coders(1, 0.0)
    first = table()
    coders.follow(first)
    for _ in range(60):
        coders.observe(4 * 0.1, 0.6, 1 / 6)
    slower = {
        name: candidate(name, encode=StageCost(bytes_per_s=5e8)) if name != "none" else each
        for name, each in first.candidates.items()
    }
    coders.follow(table(candidates=slower))
    assert coders.factor == pytest.approx(2.0, rel=0.05)
    coders.follow(None)
    assert coders.factor == 1.0


def test_credit_is_a_share_of_the_time() -> None:
    """Trying out costs at most its share of the time and what is saved up, in one of four transfers."""
    credit = Credit()
    spent = tried = 0.0
    for _ in range(2000):
        allowance_s = credit.allowance_s()
        extra_s = 0.3 if allowance_s >= 0.3 else 0.0
        spent += extra_s
        tried += allowance_s > 0
        credit.settle(1.0 + extra_s, extra_s, 0.02)
    assert 0.02 * 2000 <= spent <= 0.02 * (2000 + 50)
    assert tried == 500


def test_credit_shrinks_with_the_transfers() -> None:
    """What large transfers saved up is not spent on small ones."""
    credit = Credit()
    for _ in range(100):
        credit.settle(10.0, 0.0, 0.02)
    credit.settle(0.01, 0.0, 0.02)
    assert [credit.allowance_s() for _ in range(4)][-1] <= 0.01
