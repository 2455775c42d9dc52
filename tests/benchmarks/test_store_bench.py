"""The pure parts of ``make bench-store``: times against computing, and the claims."""

import pytest

from store_rows import KVSERVE, LMCACHE, RAW, RECOMPUTE, Row, claims, vs_recompute


def row(mode: str, p50_s: float, *, mbit: float | None = 1000.0, prefix: int = 2000) -> Row:
    """Return a mode's row."""
    return {
        "store": "redis",
        "bandwidth_mbit": mbit,
        "prefix_tokens": prefix,
        "mode": mode,
        "ttft_s": {"p50": p50_s},
    }


def test_times_are_against_computing_the_same_prefix_at_the_same_link() -> None:
    """Each mode's time is held against the recomputation of its own link and prefix."""
    rows = [
        row(RECOMPUTE, 2.0),
        row(RAW, 0.5),
        row(RECOMPUTE, 1.0, prefix=1000),
        row(KVSERVE, 0.1, prefix=1000),
        row(RECOMPUTE, 2.2, mbit=None),
        row(KVSERVE, 1.1, mbit=None),
        row(KVSERVE, 1.0, mbit=100.0),
    ]
    assert vs_recompute(rows) == {
        "redis 1000 Mbit/s": {"2000": {RAW: 4.0}, "1000": {KVSERVE: 10.0}},
        "redis unshaped": {"2000": {KVSERVE: 2.0}},
    }


@pytest.mark.parametrize(
    ("at_gbit_s", "at_slow_s", "held"),
    [
        pytest.param(0.05, 2.0, [True, True], id="both"),
        pytest.param(0.10, 2.2, [False, False], id="neither"),
    ],
)
def test_claims(at_gbit_s: float, at_slow_s: float, held: list[bool]) -> None:
    """One is about 2,000 tokens at 1 Gbit/s, the other about the worst of all links."""
    rows = [
        row(RECOMPUTE, 2.0),
        row(KVSERVE, at_gbit_s),
        row(RECOMPUTE, 2.0, mbit=100.0),
        row(KVSERVE, at_slow_s, mbit=100.0),
    ]
    assert [claim["holds"] for claim in claims(rows)] == held
    assert claims(rows)[0]["value"] == pytest.approx(2.0 / at_gbit_s)


@pytest.mark.parametrize(("peer_s", "held"), [(0.3, True), (0.1, False)])
def test_lmcache_is_held_against_kvserve_where_it_was_measured(peer_s: float, held: bool) -> None:
    """Its time over KVServe's, at the same link and prefix."""
    rows = [row(RECOMPUTE, 2.0), row(KVSERVE, 0.2), row(LMCACHE, peer_s)]
    (claim,) = [one for one in claims(rows) if "LMCache" in one["claim"]]
    assert claim["value"] == pytest.approx(peer_s / 0.2)
    assert claim["holds"] is held
