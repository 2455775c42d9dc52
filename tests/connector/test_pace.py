"""How long a running prefill will still take."""

from kvserve_connector.pace import KEPT, Pace


def test_the_fastest_of_the_latest_tells() -> None:
    """What is left is what the fastest known pace leaves, never less than nothing, and old paces are forgotten."""
    pace = Pace()
    assert pace.left_s(1000, 0.0) == 0
    pace.add(1000, 0.5)
    pace.add(100, 0.25)
    assert pace.left_s(2000, 0.25) == 0.75
    assert pace.left_s(2000, 1.25) == 0
    for _ in range(KEPT):
        pace.add(100, 0.25)
    assert pace.left_s(2000, 0.0) == 5.0


def test_nothing_is_learnt_from_nothing() -> None:
    """A prefill that was seen only when it was over, or in no time, says nothing."""
    pace = Pace()
    pace.add(0, 1.0)
    pace.add(10, 0.0)
    assert pace.left_s(1000, 0.0) == 0
