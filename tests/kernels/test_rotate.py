"""Rotation and its tables."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_kernels import rotate
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.rotate import rotate_ref

SEEDS = st.integers(0, 2**32 - 1)
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bfloat16", "float32"])


@pytest.mark.parametrize("scale", [1.0, 0.1 * math.log(4) + 1, 1 / (0.1 * math.log(4) + 1)])
@pytest.mark.parametrize("first_token", [0, 7, 131_000])
def test_tables(scale: float, first_token: int) -> None:
    """Tables are the scaled cosines and sines of position times frequency, to the last bit or nearly so."""
    inv_freq = np.append(500_000.0 ** (-np.arange(31) / 31), 0.0)
    cos, sin = rotate.tables(inv_freq, scale, first_token, 50)
    for t in range(50):
        for i in range(32):
            # the product of a position and a float64 is exact only in a wider type
            angle = float(Fraction(float(inv_freq[i])) * (first_token + t) % Fraction(2 * math.pi))
            slack = 2.0**-24 * scale + 2.0**-50 * (first_token + t)
            assert abs(float(cos[t, i]) - scale * math.cos(angle)) < slack
            assert abs(float(sin[t, i]) - scale * math.sin(angle)) < slack


def test_tables_of_quarter_turns() -> None:
    """Quarters of a turn give exactly 0, 1 and -1."""
    cos, sin = rotate.tables(np.array([math.pi / 2]), 1.0, 0, 6)
    np.testing.assert_array_equal(cos[:, 0], [1, 0, -1, 0, 1, 0])
    np.testing.assert_array_equal(sin[:, 0], [0, 1, 0, -1, 0, 1])


@TYPES
@pytest.mark.parametrize("interleaved", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(2, 130)),
    data=st.data(),
)
def test_rotation(
    dtype: Any, interleaved: bool, seed: int, shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    """Keys turn back and forth as defined, whatever part of them turns."""
    pairs = data.draw(st.integers(1, shape[3] // 2))
    rng = np.random.default_rng(seed)
    x = narrow(rng.standard_normal(shape).astype(np.float32) * np.float32(30), dtype)
    cos, sin = rotate.tables(10_000.0 ** (-np.arange(pairs) / pairs), 1.0, 1000, shape[1])
    back = rotate.unrotate(x, cos, sin, interleaved)
    np.testing.assert_array_equal(back, rotate_ref.unrotate(x, cos, sin, interleaved))
    made = rotate.rotate(back, cos, sin, interleaved, dtype)
    np.testing.assert_array_equal(made, rotate_ref.rotate(back, cos, sin, interleaved, dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_that_of_complex_numbers(interleaved: bool) -> None:
    """A pair is a complex number times e^(i angle); turned back it is what it was."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 30, 3, 4)) + 1j * rng.standard_normal((2, 30, 3, 4))
    inv_freq = np.array([1.0, 0.3, 0.1, 0.0])
    turned = z * np.exp(1j * np.arange(5, 35)[:, None, None] * inv_freq)

    def heads(numbers: Any) -> Any:
        parts = np.stack([numbers.real, numbers.imag], axis=-1 if interleaved else -2)
        return parts.reshape(2, 30, 3, 8).astype(np.float32)

    cos, sin = rotate.tables(inv_freq, 1.0, 5, 30)
    made = rotate.rotate(heads(z), cos, sin, interleaved, np.float32)
    np.testing.assert_allclose(made, heads(turned), atol=1e-6)
    np.testing.assert_allclose(rotate.unrotate(made, cos, sin, interleaved), heads(z), atol=1e-6)


def test_an_attention_factor_comes_off_and_on() -> None:
    """Keys that a model scaled by its attention factor are turned back to what they were before it."""
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((1, 9, 2, 12)).astype(np.float32)
    inv_freq, factor = np.array([0.7, 0.2, 0.05]), 1.4
    scaled = rotate.rotate(plain, *rotate.tables(inv_freq, factor, 3, 9), False, np.float32)
    exact = rotate.rotate(plain, *rotate.tables(inv_freq, 1.0, 3, 9), False, np.float32)
    np.testing.assert_allclose(scaled[..., :6], 1.4 * exact[..., :6], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scaled[..., 6:], plain[..., 6:])
    back = rotate.unrotate(scaled, *rotate.tables(inv_freq, 1 / factor, 3, 9), False)
    np.testing.assert_allclose(back, plain, atol=1e-6)
