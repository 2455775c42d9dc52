"""The definition of row scaling."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen


def _factors(exponents: NDArray[np.uint8]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.ldexp(1.0, exponents.astype(np.int32) - 127)
    return np.sqrt(squares).astype(np.float32).astype(np.float64)


def scale(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint8]] | None:
    """Divide each row by ``sqrt(2 ** (e - 127))``, where e is the float32 exponent of its mean square."""
    wide = widen(x)
    sums = np.cumsum(wide.astype(np.float64) ** 2, axis=1)[:, -1]
    with np.errstate(over="ignore"):
        squares = (sums / x.shape[1]).astype(np.float32)
    if not np.isfinite(squares).all():
        return None
    exponents = (squares.view(np.uint32) >> 23).astype(np.uint8)
    inverses = (1 / _factors(exponents)).astype(np.float32)
    return wide * inverses[:, None], exponents


def unscale(x: NDArray[np.float32], exponents: NDArray[np.uint8], dtype: Any) -> NDArray[Any]:
    """Undo `scale`."""
    return narrow(x * _factors(exponents).astype(np.float32)[:, None], dtype)
