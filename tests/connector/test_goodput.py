"""What one more sample changes in what is thought of a link."""

from hypothesis import given
from hypothesis import strategies as st

from kvserve_connector.goodput import Goodput, Sample, blend
from kvserve_connector.links import BURST_BYTES

MB = 1e6


def sample(
    acked: float, busy_s: float, *, burst: float = BURST_BYTES, slack_s: float = 0
) -> Sample:
    """Return a sample, of one burst if nothing else is said."""
    return Sample(acked_bytes=acked, burst_bytes=burst, busy_s=busy_s, slack_s=slack_s)


def of(bytes_per_s: float, shown: float | None = None) -> Goodput:
    """Return what is thought of a link, which has shown no more if nothing else is said."""
    return Goodput(bytes_per_s=bytes_per_s, shown_bytes_per_s=shown or bytes_per_s)


def rate(known: Goodput | None) -> float:
    """Return the goodput that is known."""
    assert known is not None
    return known.bytes_per_s


def test_first_sample_counts_whole() -> None:
    """The first sample is the estimate, without what may have been a burst."""
    acked = 10 * MB
    assert rate(blend(None, sample(acked, 1.0))) == acked - BURST_BYTES


def test_drop_is_followed_within_two_samples() -> None:
    """After a drop from 1 Gbit/s to 50 Mbit/s the second sample comes within a factor of 2.9, the third of 1.6."""
    known: Goodput | None = of(125 * MB)
    for _ in range(2):
        known = blend(known, sample(6.25 * MB, 1.0))
    assert 6.25 * MB <= rate(known) < 2.9 * 6.25 * MB
    assert rate(blend(known, sample(6.25 * MB, 1.0))) < 1.6 * 6.25 * MB


def test_recovery_is_followed_within_two_samples() -> None:
    """After a recovery two samples make at least 70 % of the way up."""
    known: Goodput | None = of(6.25 * MB)
    for _ in range(2):
        known = blend(known, sample(12.5 * MB, 0.1))
    assert rate(known) > 0.7 * 125 * MB


def test_bursts_do_not_look_like_a_fast_link() -> None:
    """Chunks that pass at once after a pause say nothing about a faster link."""
    slow = of(25 * MB)
    assert blend(slow, sample(6 * BURST_BYTES, 0.001, burst=6 * BURST_BYTES)) == slow


def test_small_transfers_leave_a_fast_link_fast() -> None:
    """Ten chunks of 190 kB whose acknowledgements came a tick late each do not make 8 Gbit/s slow, however often."""
    known: Goodput | None = of(1000 * MB)
    for _ in range(20):
        known = blend(known, sample(1.9 * MB, 0.03, burst=10 * BURST_BYTES, slack_s=0.03))
    assert rate(known) == 1000 * MB


def test_a_late_transfer_is_forgotten() -> None:
    """One that was held up lowers the estimate; after five more that were not it is as before, to 5 %."""
    known = blend(of(1000 * MB), sample(1.9 * MB, 0.07, burst=10 * BURST_BYTES, slack_s=0.04))
    assert rate(known) < 400 * MB
    for _ in range(5):
        known = blend(known, sample(1.9 * MB, 0.03, burst=10 * BURST_BYTES, slack_s=0.03))
    assert rate(known) > 950 * MB


def test_what_a_link_has_shown_is_contradicted_by_a_drop() -> None:
    """On a link that became slow for good the estimate stays there, with small transfers as with large ones."""
    known: Goodput | None = of(1000 * MB)
    for _ in range(30):
        known = blend(known, sample(0.19 * MB, 0.076, slack_s=0.004))
        known = blend(known, sample(0.05 * MB, 0.02, burst=0.05 * MB, slack_s=0.004))
    assert 2.4 * MB < rate(known) < 2.7 * MB


@given(
    known=st.none() | st.floats(1e3, 1e12),
    shown=st.floats(1, 1e3),
    acked=st.floats(0, 1e13),
    burst=st.floats(0, 1e13),
    busy_s=st.floats(0, 1e6),
    slack_s=st.floats(0, 1e6),
)
def test_estimates_stay_bounded(
    known: float | None, shown: float, acked: float, burst: float, busy_s: float, slack_s: float
) -> None:
    """Whatever a sample says, the estimate is finite, positive, and among what was thought, shown and seen."""
    before = None if known is None else of(known, min(known * shown, 1e12))
    seen = sample(acked, busy_s, burst=burst, slack_s=slack_s)
    new = blend(before, seen)
    assert new is None or 1e3 <= new.bytes_per_s <= new.shown_bytes_per_s <= 1e12
    if new is not None and before is not None and busy_s > 0:
        among = (
            before.bytes_per_s,
            before.shown_bytes_per_s,
            min(max(acked / busy_s, 1e3), 1e12),
        )
        assert min(among) * 0.999 <= new.bytes_per_s <= max(among) * 1.001
