"""Codec costs: what is fitted to measured times."""

import pytest

from kvserve_profiler.cost import device_kind, fit, least_s, sizes_tokens
from kvserve_profiler.quality import MeasurementError

SIZES = (1_000_000, 10_000_000, 40_000_000)


def test_a_line_is_found_again() -> None:
    """Times of offset + V / S give offset and S."""
    cost = fit(SIZES, [0.002 + size / 1e9 for size in SIZES])
    assert cost.offset_s == pytest.approx(0.002)
    assert cost.bytes_per_s == pytest.approx(1e9)
    assert cost.floor_s == pytest.approx(0.003)


def test_noise_does_not_make_a_negative_offset() -> None:
    """Times that grow faster than their size give a cost through zero, which is close to all of them."""
    times = [size / 1e9 for size in SIZES[:2]] + [0.05]
    cost = fit(SIZES, times)
    assert cost.offset_s == 0.0
    assert 0.75e9 < cost.bytes_per_s < 1e9
    for size, spent in zip(SIZES, times, strict=True):
        assert cost.seconds(size) == pytest.approx(spent, rel=0.3)


def test_times_that_fall_still_give_a_cost() -> None:
    """A larger transfer measured faster than a smaller one does not break the fit."""
    cost = fit(SIZES, [0.004, 0.003, 0.002])
    assert cost.bytes_per_s > 0
    assert cost.floor_s == 0.002


@pytest.mark.parametrize("times", [[0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]])
def test_times_that_mean_nothing_fail_the_trial(times: list[float]) -> None:
    """Zero and NaN are no costs."""
    with pytest.raises(MeasurementError):
        fit(SIZES, times)


def test_the_first_call_is_not_timed() -> None:
    """What only the first call does, like compiling, is not part of the cost."""
    calls = []

    def action() -> None:
        calls.append(1)
        if len(calls) == 1:
            sum(range(3_000_000))

    assert least_s(action, 3) < 0.01
    assert len(calls) == 4


def test_sizes_are_ascending_and_end_with_the_prefix() -> None:
    """Codecs are timed at a small size, a quarter and the whole prefix."""
    assert sizes_tokens(768) == (16, 192, 768)
    assert sizes_tokens(48) == (12, 16, 48)


def test_device_kind_is_a_processor() -> None:
    """The device is named after what decides the speed of codecs."""
    assert device_kind().startswith("cpu-")
