"""The kernels of peers' quantisers and coders agree with their definitions, bit by bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_kernels import absmax, escape, lloyd, predict
from kvserve_kernels.absmax import absmax_ref
from kvserve_kernels.bits_ref import narrow, widen
from kvserve_kernels.escape import escape_ref
from kvserve_kernels.lloyd import lloyd_ref
from kvserve_kernels.predict import predict_ref

SEEDS = st.integers(0, 2**32 - 1)
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bfloat16", "float32"])


def sample(seed: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return values with outliers, zeros, halves and tiny numbers among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    values = np.where(rng.random(shape) < 0.2, np.rint(values * 8) / 2, values).astype(np.float32)
    values *= rng.choice(np.array([1, 1, 1, 0, 1e-36, 100, 3e4], np.float32), shape)
    return narrow(values, dtype)


@TYPES
@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    rows=st.integers(1, 9),
    dim=st.integers(1, 130),
    bins=st.sampled_from([4, 5, 16, 32, 256]),
)
def test_absmax(dtype: Any, seed: int, rows: int, dim: int, bins: int) -> None:
    """Codes, peaks and values are those of the definition, and each value is within half a step."""
    x = sample(seed, (rows, dim), dtype)
    codes, peaks = absmax.encode(x, bins)
    wanted_codes, wanted_peaks = absmax_ref.encode(x, bins)
    np.testing.assert_array_equal(codes, wanted_codes)
    np.testing.assert_array_equal(peaks, wanted_peaks)
    assert codes.max() <= 2 * (bins // 2 - 1)
    out = absmax.decode(codes, peaks, bins)
    np.testing.assert_array_equal(out, absmax_ref.decode(codes, peaks, bins))
    half = widen(peaks)[:, None].astype(np.float64) / (bins // 2 - 1) / 2
    rounding = np.abs(widen(x)) * 2.0**-8
    assert (
        np.abs(widen(out).astype(np.float64) - widen(x)) <= half * 1.001 + rounding + 1e-33
    ).all()


def test_absmax_rounds_halves_to_even() -> None:
    """Half a step goes to the even code, as PyTorch rounds: 32 bins, peak 30, so a step is 2."""
    x = np.array([[30, 1, 3, -1, -3, 5]], np.float32)
    codes, peaks = absmax.encode(x, 32)
    assert peaks.tolist() == [30.0]
    assert codes.tolist() == [[30, 16, 16, 14, 14, 18]]


@TYPES
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 9), dim=st.integers(1, 130), count=st.integers(2, 16))
def test_lloyd(dtype: Any, seed: int, rows: int, dim: int, count: int) -> None:
    """Root mean squares, codes and values are those of the definition."""
    x = sample(seed, (rows, dim), dtype)
    scales = lloyd.root_mean_squares(x, dtype)
    assert scales is not None
    np.testing.assert_array_equal(scales, lloyd_ref.root_mean_squares(x, dtype))
    centroids = np.sort(np.random.default_rng(seed).standard_normal(count)).astype(np.float32)
    thresholds = (centroids[1:] + centroids[:-1]) / np.float32(2)
    codes = lloyd.encode(x, scales, thresholds)
    np.testing.assert_array_equal(codes, lloyd_ref.encode(x, scales, thresholds))
    for of in (codes, codes | np.uint8(240)):
        out = lloyd.decode(of, scales, centroids, dtype)
        np.testing.assert_array_equal(out, lloyd_ref.decode(of, scales, centroids, dtype))


def test_lloyd_refuses_squares_beyond_float32() -> None:
    """A root mean square that float32 can't hold is refused, by kernel and definition."""
    x = np.full((1, 2), 3e38, np.float32)
    assert lloyd.root_mean_squares(x, np.float32) is not None
    x[0, 0] = np.inf
    assert lloyd.root_mean_squares(x, np.float32) is None
    assert lloyd_ref.root_mean_squares(x, np.float32) is None


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, count=st.sampled_from([1, 2, 3, 17, 1000, 65_537]), spread=st.integers(1, 256))
def test_escape(seed: int, count: int, spread: int) -> None:
    """Every byte comes back, and the coded form is that of the definition."""
    rng = np.random.default_rng(seed)
    data = np.minimum(rng.geometric(2 / (spread + 1), count), 255).astype(np.uint8)
    coded, wanted = escape.encode(data), escape_ref.encode(data)
    for name in ("book", "codes", "counts", "positions", "values"):
        np.testing.assert_array_equal(getattr(coded, name), getattr(wanted, name), err_msg=name)
    np.testing.assert_array_equal(escape.decode(coded, count), data)
    np.testing.assert_array_equal(escape_ref.decode(coded, count), data)


def test_escape_takes_the_most_frequent() -> None:
    """Of seventeen bytes the rarest is an escape, and its position counts from the start of its chunk."""
    data = np.resize(np.delete(np.arange(17, dtype=np.uint8), 7), escape.CHUNK + 100)
    data[escape.CHUNK + 5] = 7
    coded = escape.encode(data)
    assert coded.book.tolist() == [i for i in range(17) if i != 7]
    assert coded.counts.tolist() == [0, 1]
    assert coded.positions.tolist() == [5]
    assert coded.values.tolist() == [7]


@pytest.mark.parametrize("positions", [[3, 3], [4, 3], [3, 10]])
def test_escape_refuses_positions_that_can_not_be(positions: list[int]) -> None:
    """Positions that stand still, fall, or lie outside give None."""
    coded = escape.Escaped(
        book=np.arange(16, dtype=np.uint8),
        codes=np.zeros(5, np.uint8),
        counts=np.array([2], np.uint32),
        positions=np.array(positions, np.uint16),
        values=np.zeros(2, np.uint8),
    )
    assert escape.decode(coded, 10) is None


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    tokens=st.sampled_from([1, 2, 30, 300, 513]),
    channels=st.integers(1, 20),
    sources=st.integers(1, 8),
    scale=st.sampled_from([1.0, 1e-38, 1e-20, 1e25, 1e34]),
)
def test_predict(seed: int, tokens: int, channels: int, sources: int, scale: float) -> None:
    """Sources, weights and predictions are those of the definition, and no channel is left with more than it had."""
    rng = np.random.default_rng(seed)
    before = rng.standard_normal((tokens, channels)).astype(np.float32)
    mixed = before @ (
        rng.standard_normal((channels, channels)) * (rng.random((channels, channels)) < 0.2)
    )
    x = (mixed + 0.3 * rng.standard_normal(mixed.shape)).astype(np.float32)
    before[:, 0] *= np.float32(0 if seed % 2 else 1e-5)
    x = (x * np.float32(scale)).astype(np.float32)
    chosen, weights = predict.fit(before, x, sources)
    wanted_chosen, wanted_weights = predict_ref.fit(before, x, sources)
    np.testing.assert_array_equal(chosen, wanted_chosen)
    np.testing.assert_array_equal(weights, wanted_weights)
    out = predict.apply(before, chosen, weights)
    np.testing.assert_array_equal(out, predict_ref.apply(before, chosen, weights))
    rest = (x - out).astype(np.float64)
    assert ((rest**2).sum(0) <= (x.astype(np.float64) ** 2).sum(0) * (1 + 1e-9)).all()


def test_predict_finds_what_was_put_in() -> None:
    """A channel that is twice one source less half of another is predicted from these two."""
    before = np.random.default_rng(0).standard_normal((400, 12)).astype(np.float32)
    x = np.zeros_like(before)
    x[:, 5] = 2 * before[:, 7] - 0.5 * before[:, 2]
    chosen, weights = predict.fit(before, x, 4)
    assert chosen[5].tolist()[:2] == [7, 2]
    np.testing.assert_allclose(weights[5].astype(float), [2, -0.5, 0, 0], atol=0.01)
    assert not weights[np.arange(12) != 5].any()
