"""Scaling of rows by a power of the square root of two, on the CPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import float_bits, narrow, widen
from kvserve_kernels.jit import njit

FACTORS: NDArray[np.float32] = np.sqrt(np.ldexp(1.0, np.arange(256) - 127)).astype(np.float32)
INVERSES: NDArray[np.float32] = (1 / FACTORS.astype(np.float64)).astype(np.float32)


@njit
def _scale(x, inverses, exponents, out):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    for r in range(rows):
        total = 0.0
        for j in range(dim):
            v = np.float64(widen(x[r, j]))
            total += v * v
        square = np.float32(total / dim)
        if not square < np.float32(np.inf):
            return False
        exponent = float_bits(square) >> np.uint32(23)
        exponents[r] = np.uint8(exponent)
        inverse = inverses[exponent]
        for j in range(dim):
            out[r, j] = widen(x[r, j]) * inverse
    return True


@njit
def _unscale(x, factors, exponents, out):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    for r in range(rows):
        factor = factors[exponents[r]]
        for j in range(dim):
            out[r, j] = narrow(x[r, j] * factor, out[0, 0])


def scale(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint8]] | None:
    """Divide each row by ``sqrt(2 ** (e - 127))``, where e is the float32 exponent of its mean square.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.

    Returns:
        The quotients, float32, of mean square 1 to 2 (0 for a row of zeros), and the exponents ``[rows]``; None if a
        mean square exceeds float32.
    """
    out = np.empty(x.shape, np.float32)
    exponents = np.empty(x.shape[0], np.uint8)
    return (out, exponents) if _scale(x, INVERSES, exponents, out) else None


def unscale(x: NDArray[np.float32], exponents: NDArray[np.uint8], dtype: Any) -> NDArray[Any]:
    """Undo `scale`, to float32 or to bfloat16 bits (uint16)."""
    out = np.empty(x.shape, dtype)
    _unscale(x, FACTORS, exponents, out)
    return out
