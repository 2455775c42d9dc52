"""Means of a piece that are not those of the calibration text."""

import numpy as np
import pytest
import torch
from tests.strategies.calibrated import grid, joint, recentred

from bundles import small_cache, write_small_bundle
from kvserve_api.errors import StrategyError, ValuesError
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import Pipeline
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.stages import Ladder, Mean, Pca, Raw, Recentre, Unrope

SHAPE = (5, 300, 2, 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the small model's bundle."""
    return write_small_bundle(tmp_path_factory.mktemp("bundle") / "small")


def coded(config: StrategyConfig, bundle: Bundle) -> tuple[int, float, float]:
    """Return the bytes of a piece, the root mean square of values' errors, and that of the errors' means."""
    keys, values = small_cache(3, SHAPE[1], torch.float32)
    values += 1.5
    pipeline = Pipeline.of(config, bundle)
    payload = pipeline.encode(keys, values)
    _, decoded = pipeline.decode(payload, shape=SHAPE, dtype=keys.dtype)
    errors = (decoded - values).double().numpy()
    return (
        len(payload),
        float(np.sqrt(np.square(errors).mean())),
        float(np.sqrt(np.square(errors.mean(axis=1)).mean())),
    )


def test_errors_have_no_mean(bundle: Bundle) -> None:
    """With a coarse step the error that all tokens share is gone, for a byte a component; others are no larger."""
    plain = coded(joint(*grid(6.0)), bundle)
    ours = coded(joint(*recentred(grid(6.0))), bundle)
    assert ours[2] < 0.2 * plain[2]
    assert ours[1] < plain[1]
    assert ours[0] < plain[0] + 5 * 2 * 2 * 8 + 50


def test_not_finite_is_refused(bundle: Bundle) -> None:
    """NaN and infinity are refused as by any lossy strategy."""
    pipeline = Pipeline.of(joint(*recentred(grid(0.3))), bundle)
    for wrong in (float("nan"), float("inf"), 1e30):
        keys, values = small_cache(3, 40, torch.float32)
        values[1, 3, 0, 2] = wrong
        with pytest.raises(ValuesError):
            pipeline.encode(keys, values)


def test_where_it_stands() -> None:
    """It stands between components and a quantiser of components."""
    for stages in (
        (Unrope(), Mean(), Recentre(step=0.1), *grid(0.3)[2:]),
        (Unrope(), Mean(), Pca(layers=1, heads=0), Recentre(step=0.1), Ladder()),
        (Recentre(step=0.1), Raw()),
    ):
        with pytest.raises(StrategyError):
            Pipeline.of(joint(*stages))
