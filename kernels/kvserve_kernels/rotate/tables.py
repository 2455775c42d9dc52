"""Cosines and sines of rotary angles, with the same bits on every machine.

Libraries differ in the last bit of a cosine. Here the angle is reduced in turns, where that is exact, and a polynomial
of float64 products and sums does the rest.
"""

import math

import numpy as np
from numpy.typing import NDArray

# Taylor series: on [-pi/4, pi/4] the first term left out is below 2**-55
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(9))
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(9))
_TURN = 2 * math.pi


def tables(
    inv_freq: NDArray[np.float64], scale: float, first_token: int, tokens: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of the angles of successive tokens, each ``[tokens, pairs]`` float32.

    Callers should keep them: they depend on the model and the positions alone.

    Args:
        inv_freq: ``[pairs]``: radians a token advances.
        scale: Factor of the results. Where a model multiplies its cosines and sines by an attention factor, that factor
            to rotate, its reciprocal to undo; else 1.
        first_token: Position of the first token.
        tokens: How many.
    """
    positions = np.arange(first_token, first_token + tokens, dtype=np.float64)
    quarters = positions[:, None] * (np.asarray(inv_freq, np.float64) / _TURN * 4)
    nearest = np.rint(quarters)
    angle = (quarters - nearest) * (_TURN / 4)
    square = angle * angle
    sin, cos = _horner(_SIN, square) * angle, _horner(_COS, square)
    quadrant = nearest.astype(np.int64) & 3
    swapped = (quadrant & 1) == 1
    out_cos = np.where(swapped, sin, cos) * np.where((quadrant + 1) & 2, -scale, scale)
    out_sin = np.where(swapped, cos, sin) * np.where(quadrant & 2, -scale, scale)
    return out_cos.astype(np.float32), out_sin.astype(np.float32)


def _horner(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result *= x
        result += coefficient
    return result
