"""Rounding a matrix to int8 so that its products with values of a known covariance change least.

Rounding each number to the nearest spreads errors evenly over all directions of the input; but a cache has most of its
energy in few of them. Here the errors of a row are made to cancel where there is energy: numbers are rounded one after
the other, and each takes into account what those before it did.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError

Real = NDArray[np.float64]
_SPREAD: Final = 1.3
_EVENNESS: Final = 0.35
_PEAK: Final = 8
_OUTER: Final = 256
_INNER: Final = 32


def input_scales(matrix: Real, deviation: Real) -> Real:
    """Return what channels are multiplied by before they are rounded to int8.

    A larger number makes the rounding of the channel finer, and its column of the matrix less; the largest of a row
    says how finely all of the row is rounded. So channels get int8 by a power of their part in the result: 0 would use
    all of int8 for each channel, 1 make all columns of the matrix alike. The whole is scaled so that a token whose
    values are about those of the calibration fills int8: larger ones are shifted down as a whole.

    Args:
        matrix: ``[components, width]``.
        deviation: ``[width]``, positive.

    Returns:
        ``[width]``, positive.
    """
    part = np.sqrt(np.square(matrix).mean(axis=0)) * deviation
    part = np.maximum(part / max(part.max(), np.finfo(np.float64).tiny), 2.0**-40)
    reach = part**_EVENNESS
    # between the sum and the largest of them: the more channels may be the largest, the larger it will be
    peak = np.sum(reach**_PEAK) ** (1 / _PEAK)
    scales: Real = reach * (127 / (_SPREAD * peak)) / deviation
    return scales


def rounded(matrix: Real, covariance: Real) -> NDArray[np.int8]:
    """Return an int8 matrix Q that makes ``(Q - matrix) · x`` small for values x of a covariance.

    The errors e of a row cost ``e' C e``. With ``C = U U'``, U upper triangular, that is the sum of the squares of
    ``U' e``, whose element k depends on the first k errors only: number k is rounded after what they add to it. It is
    Babai's nearest plane ("On Lovász' lattice reduction and the nearest lattice point problem", 1986), for matrices of
    neural networks known as GPTQ (Frantar et al., "GPTQ: accurate post-training quantization", 2023). The channels of
    the largest variance come first, because there are most others left to cancel their errors.

    Args:
        matrix: ``[rows, width]``, magnitudes at most 127.
        covariance: ``[width, width]``, positive definite.

    Returns:
        ``[rows, width]``, magnitudes at most 127.

    Raises:
        ArtifactError: The covariance is not one.
    """
    order = np.argsort(-np.diagonal(covariance), kind="stable")
    # rows are channels here: numpy is fastest along the last axis
    wanted = np.ascontiguousarray(matrix.T[order])
    feedback = _feedback(covariance[np.ix_(order, order)])
    whole = np.empty(wanted.shape, np.int8)
    errors = np.empty_like(wanted)
    width = len(order)
    for start in range(0, width, _OUTER):
        outer = slice(start, min(start + _OUTER, width))
        from_before = feedback[:start, outer].T @ errors[:start]
        for first in range(start, outer.stop, _INNER):
            inner = slice(first, min(first + _INNER, outer.stop))
            near = slice(start, first)
            shifted = wanted[inner] + from_before[first - start : inner.stop - start]
            shifted += feedback[near, inner].T @ errors[near]
            for k in range(first, inner.stop):
                to = shifted[k - first] + feedback[first:k, k] @ errors[first:k]
                nearest = np.clip(np.rint(to), -127, 127)
                whole[k] = nearest
                errors[k] = wanted[k] - nearest
    out = np.empty(matrix.shape, np.int8)
    out[:, order] = whole.T
    return out


def _feedback(covariance: Real) -> Real:
    """Return U over its diagonal column by column, for the upper triangular U of ``covariance = U U'``."""
    try:
        # the lower factor of the mirrored matrix is the upper one of the matrix, mirrored
        lower: NDArray[Any] = np.linalg.cholesky(covariance[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise ArtifactError("basis", "its covariance is not positive definite") from error
    upper = lower[::-1, ::-1]
    return np.ascontiguousarray(upper / np.diagonal(upper))
