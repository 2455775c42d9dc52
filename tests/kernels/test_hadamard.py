"""The Walsh–Hadamard transform."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_kernels import hadamard
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.hadamard import hadamard_ref

TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bfloat16", "float32"])


@TYPES
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), dim=st.integers(1, 260))
def test_hadamard(dtype: Any, seed: int, rows: int, dim: int) -> None:
    """Rows are transformed and restored as defined."""
    rng = np.random.default_rng(seed)
    x = narrow(rng.standard_normal((rows, dim)).astype(np.float32) * np.float32(9), dtype)
    made, expected = hadamard.hadamard(x), hadamard_ref.hadamard(x)
    assert made is not None
    assert expected is not None
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(
        hadamard.restore(made, dtype), hadamard_ref.restore(expected, dtype)
    )


@pytest.mark.parametrize(("dim", "size"), [(64, 64), (96, 32), (80, 16), (7, 1), (256, 256)])
def test_hadamard_is_sylvesters_matrix(dim: int, size: int) -> None:
    """Blocks of the largest power of two are multiplied by the orthonormal matrix of Sylvester's construction."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    whole = np.kron(np.eye(dim // size), matrix / np.sqrt(size))
    x = np.random.default_rng(0).standard_normal((5, dim)).astype(np.float32)
    made = hadamard.hadamard(x)
    assert hadamard.block_size(dim) == size
    assert made is not None
    np.testing.assert_allclose(made, x @ whole.T, atol=1e-5)
    np.testing.assert_allclose(hadamard.restore(made, np.float32), x, atol=1e-5)


def test_hadamard_refuses_sums_beyond_float32() -> None:
    """A row whose sum float32 can't hold is refused; one as large that cancels is not; decoding holds the largest."""
    x = np.full((2, 64), 3e38, np.float32)
    assert hadamard.hadamard(x) is None
    x = np.zeros((2, 64), np.float32)
    x[:, 0] = 3e38
    assert hadamard.hadamard(x) is not None
    held = hadamard.restore(np.full((1, 64), 3e38, np.float32), np.float32)
    assert held[0, 0] == np.finfo(np.float32).max
    assert np.isfinite(held).all()
