"""A matrix rounded to int8 whose errors cancel where the input has its energy."""

import numpy as np
import pytest

from kvserve_api.errors import ArtifactError
from kvserve_strategies.rounding import input_scales, rounded


def sample(rows: int, width: int, *, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix with magnitudes up to 127 and a covariance whose eigenvalues fall."""
    rng = np.random.default_rng(width)
    directions = np.linalg.qr(rng.standard_normal((width, width)))[0]
    covariance = (directions * np.exp(-decay * np.arange(width) / width)) @ directions.T
    return rng.uniform(-127, 127, (rows, width)), covariance


def cost(matrix: np.ndarray, whole: np.ndarray, covariance: np.ndarray) -> float:
    """Return the mean square of the errors in the products."""
    errors = whole - matrix
    return float(np.einsum("ri,ij,rj->r", errors, covariance, errors).mean())


def test_without_correlation_it_is_the_nearest() -> None:
    """Where no channel can make up for another, every number is rounded to the nearest."""
    matrix, _ = sample(5, 70, decay=0)
    np.testing.assert_array_equal(rounded(matrix, np.diag(np.arange(1.0, 71.0))), np.rint(matrix))


@pytest.mark.parametrize("width", [1, 33, 300])
def test_errors_cancel(width: int) -> None:
    """Errors cost what the geometric mean of the eigenvalues says, not the arithmetic one as for nearest rounding."""
    matrix, covariance = sample(40, width, decay=6)
    eigenvalues = np.linalg.eigvalsh(covariance)
    nearest = cost(matrix, np.rint(matrix), covariance)
    ours = cost(matrix, rounded(matrix, covariance), covariance)
    assert nearest == pytest.approx(width * eigenvalues.mean() / 12, rel=0.5)
    assert ours < 1.6 * width * np.exp(np.log(eigenvalues).mean()) / 12


def test_the_largest_numbers_stay_in_int8() -> None:
    """What errors before push beyond 127 is held there, and the rest makes up for it."""
    matrix, covariance = sample(20, 64, decay=6)
    matrix = np.where(np.abs(matrix) > 120, np.copysign(127, matrix), matrix)
    whole = rounded(matrix, covariance)
    assert whole.min() == -127
    assert whole.max() == 127
    assert cost(matrix, whole, covariance) < 0.5 * cost(matrix, np.rint(matrix), covariance)


def test_what_is_no_covariance() -> None:
    """A matrix that is not positive definite is refused."""
    with pytest.raises(ArtifactError, match="positive definite"):
        rounded(np.ones((2, 2)), np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_scales() -> None:
    """Alike channels fill int8 to alike deviations; one of a small part in the result gets less of it, but not none."""
    deviation = np.arange(1.0, 9.0, dtype=np.float64)
    reach = input_scales(np.ones((3, 8)) / deviation, deviation) * deviation
    np.testing.assert_allclose(reach, reach[0])
    assert 127 / 3 < reach[0] < 127
    matrix = np.ones((3, 8))
    matrix[:, 0] = 0.01
    less = input_scales(matrix, np.ones(8))
    assert less[0] / less[1] == pytest.approx(0.01**0.35)
    assert input_scales(np.zeros((1, 2)), np.full(2, 2.0**-90)).max() < 2.0**100
