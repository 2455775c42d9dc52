"""What is known of the way to a store is what its answers took."""

import pytest

from kvserve_api.latency import StageCost
from kvserve_connector.selector import DEFAULT_BYTES_PER_S
from kvserve_connector.stores.link import FRESH_S, PRIOR_DECODE, StoreLink, fetch_s


def fetched(link: StoreLink, start_s: float, seconds: float, nbytes: int) -> None:
    """Fetch one value."""
    link.begin(start_s)
    link.end(start_s + seconds, nbytes)


def test_goodput_counts_busy_seconds_only() -> None:
    """Idle time between values is not the link's, and values side by side share it."""
    link = StoreLink()
    assert link.goodput(0.0) == (DEFAULT_BYTES_PER_S, False)
    for start_s in (1.0, 5.0, 9.0):
        fetched(link, start_s, 0.1, 1_000_000)
    goodput, measured = link.goodput(9.1)
    assert measured
    assert goodput == pytest.approx(1e7)
    link.begin(10.0)
    link.begin(10.0)
    link.end(10.2, 1_000_000)
    link.end(10.2, 1_000_000)
    assert link.goodput(10.2)[0] == pytest.approx(1e7)


def test_goodput_follows_and_is_hoped_for_again() -> None:
    """A link that became slow is known soon; one that nobody used lately is hoped to be faster, up to the usual."""
    link = StoreLink()
    fetched(link, 0.0, 1.0, 100_000_000)
    fetched(link, 2.0, 20.0, 2_000_000)
    slow, measured = link.goodput(22.0)
    assert measured
    assert slow == pytest.approx(1e5, rel=1)
    hoped, measured = link.goodput(22.0 + 3 * FRESH_S)
    assert not measured
    assert hoped == pytest.approx(4 * slow)
    assert link.goodput(1e6)[0] == DEFAULT_BYTES_PER_S


def test_a_link_that_became_fast_is_known_after_some_prefixes() -> None:
    """However long the slow fetches took, short ones soon say more: a dozen to a half, twenty to a fifth."""
    link = StoreLink()
    for number in range(10):
        fetched(link, 2.0 * number, 0.5, 5_000_000)
    assert link.goodput(20.0)[0] == pytest.approx(1e7)
    for number in range(12):
        fetched(link, 20.0 + number, 0.02, 2_000_000)
    assert link.goodput(32.0)[0] == pytest.approx(1e8, rel=0.5)
    for number in range(8):
        fetched(link, 32.0 + number, 0.02, 2_000_000)
    assert link.goodput(40.0)[0] == pytest.approx(1e8, rel=0.2)


def test_a_value_that_does_not_come_costs_its_time() -> None:
    """Waiting in vain makes the link slower, not unknown."""
    link = StoreLink()
    fetched(link, 0.0, 0.1, 1_000_000)
    fetched(link, 1.0, 0.9, 0)
    assert link.goodput(2.0)[0] == pytest.approx(1e6, rel=0.2)


def test_codings_are_measured() -> None:
    """Until something was decoded the table's word holds, afterwards what was seen, each coding for itself."""
    link = StoreLink()
    cost = StageCost(bytes_per_s=5e8)
    assert (link.ratio("a", 4.0), link.decode(0.0, "a", cost)) == (4.0, cost)
    link.decoded(0.0, "a", 8_000_000, 1_000_000, 0.02)
    assert link.ratio("a", 4.0) == 8.0
    assert link.decode(0.0, "a", cost).bytes_per_s == pytest.approx(4e8)
    assert link.decode(2 * FRESH_S, "a", cost).bytes_per_s == pytest.approx(5e8)
    assert link.decode(0.0, "b", PRIOR_DECODE) is PRIOR_DECODE


def test_fetching_takes_the_slower_of_wire_and_decoding() -> None:
    """Values overlap but for one; what was promised to others comes first."""
    link = StoreLink()
    fetched(link, 0.0, 1.0, 10_000_000)
    link.asked(0.002)
    parts = [(8_000_000.0, 4.0, StageCost(bytes_per_s=8e8))] * 4
    # each value 0.2 s on the wire and 0.01 s decoding
    assert fetch_s(link.snapshot(1.0), parts) == pytest.approx(0.002 + 4 * 0.2 + 0.01)
    link.promise(5_000_000)
    assert fetch_s(link.snapshot(1.0), parts) == pytest.approx(0.002 + 4 * 0.2 + 0.01 + 0.5)
    link.promise(-6_000_000)
    assert link.snapshot(1.0).backlog_bytes == 0
