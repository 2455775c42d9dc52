"""The linear stages of a block as an integer matrix and its inverse."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from bundles import LAYOUT, write_small_bundle
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.folding import fold

KEYS = [BasisKey("centred", "kv", 2, 0), BasisKey("even", "kv", 2, 0), BasisKey("even", "v", 1, 1)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the small model's bundle."""
    return write_small_bundle(tmp_path_factory.mktemp("bundle") / "small", KEYS)


def samples(bundle: Bundle, key: BasisKey, index: int) -> np.ndarray:
    """Return components of the basis's deviations, ``[tokens, components]``, in units of its scale."""
    basis = bundle.basis(key)
    sigma = basis.groups[index].sigma / basis.scale
    return np.random.default_rng(1).standard_normal((2000, len(sigma))) * sigma


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_there_and_back(key: BasisKey, bundle: Bundle) -> None:
    """The integer matrix gives the components that the inverse makes values of, to about a hundredth of their unit."""
    for index in range(key.count(LAYOUT)):
        folded = fold(bundle, key, index)
        wanted = samples(bundle, key, index)
        scaled = wanted @ folded.inverse.astype(np.float64) * folded.inv_scale
        found = scaled @ folded.matrix.T.astype(np.float64) * folded.factor
        assert np.sqrt(np.square(found - wanted).mean()) < 0.012
        assert np.abs(folded.matrix).max(axis=1).min() > 100


def test_it_is_rounded_for_the_values_of_the_basis(tmp_path: Path) -> None:
    """A basis whose deviations fall makes the errors cancel where they are large."""
    key = KEYS[0]
    bundle = write_small_bundle(tmp_path, [key])
    folded = fold(bundle, key, 0)
    rows = bundle.basis(key).groups[0].rows.astype(np.float64)
    exact = rows / bundle.basis(key).scale / folded.inv_scale / folded.factor[:, None]
    wanted = samples(bundle, key, 0)
    scaled = wanted @ folded.inverse.astype(np.float64) * folded.inv_scale

    def error(matrix: np.ndarray) -> float:
        return float(np.square(scaled @ (matrix - exact).T * folded.factor).mean())

    assert error(folded.matrix) < 0.9 * error(np.rint(exact))


def test_blocks_are_kept(bundle: Bundle) -> None:
    """A block has the same arrays as long as its bundle lives; another bundle, even of the same content, its own."""
    inverse = fold(bundle, KEYS[1], 0).inverse
    gc.collect()
    first = fold(bundle, KEYS[1], 0)
    assert first.inverse is inverse
    assert fold(bundle, KEYS[1], 1) is not first
    part = bundle.of_heads(range(2))
    assert fold(part, KEYS[1], 0) is not first
    gone = weakref.ref(fold(part, KEYS[1], 0))
    del part
    gc.collect()
    assert gone() is None
