"""Means over tokens: as defined to the last bit, and what they are meant to be."""

import numpy as np
import pytest
import torch

from kvserve_kernels.mean import Turning, combine, mean_ref, token_means
from kvserve_kernels.rotate import rotate_ref

TOKENS, HEADS, DIM = 37, 3, 10


def piece(dtype: torch.dtype) -> np.ndarray:
    """Return keys of one layer."""
    x = torch.randn(TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(5)) + 1
    x = x.to(dtype)
    return x.view(torch.uint16).numpy() if dtype == torch.bfloat16 else x.numpy()


def tables(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of angles of each token."""
    angles = np.random.default_rng(3).uniform(0, 6, (TOKENS, pairs))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("pairs", [0, 3, 5], ids=["still", "partial", "whole"])
def test_means(dtype: torch.dtype, interleaved: bool, pairs: int) -> None:
    """They are the means of the keys turned back, and equal to the definition to the last bit."""
    x, (cos, sin) = piece(dtype), tables(pairs)
    turning = Turning.of(cos, sin, interleaved, HEADS, DIM) if pairs else None
    found = token_means(x, turning)
    np.testing.assert_array_equal(found, mean_ref.token_means(x, turning))
    values = torch.from_numpy(x)
    values = values.view(torch.bfloat16) if dtype == torch.bfloat16 else values
    plain = values.float().numpy()
    if pairs:
        plain = rotate_ref.unrotate(plain[None], cos, sin, interleaved)[0]
    np.testing.assert_allclose(found, plain.mean(axis=0), atol=1e-6)


def test_not_finite() -> None:
    """A value that is not finite shows in the mean of its channel, and in no other."""
    x = piece(torch.float32).copy()
    x[5, 1, 2] = np.inf
    found = token_means(x, None)
    assert np.isinf(found[1, 2])
    assert np.isfinite(found).sum() == found.size - 1


def test_combine() -> None:
    """Levels times rows of bfloat16, as defined to the last bit."""
    rng = np.random.default_rng(1)
    levels = rng.integers(-3, 4, 50).astype(np.int16)
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    bits = rows.view(torch.uint16).numpy()
    found = combine(levels, bits)
    np.testing.assert_array_equal(found, mean_ref.combine(levels, bits))
    np.testing.assert_allclose(found, levels @ rows.double().numpy(), atol=1e-12)
