"""The definition of splitting a float: ``sign | exponent | mantissa`` to ``exponent`` and ``sign | mantissa``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def split(words: NDArray[Any], mantissa: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Return exponents, and signs above mantissas."""
    low = (1 << mantissa) - 1
    top = words.itemsize * 8 - 1
    wide = words.astype(np.int64)
    exponents = (wide >> mantissa) & ((1 << (top - mantissa)) - 1)
    rest = (wide & low) | (wide >> top << mantissa)
    return exponents.astype(np.uint8), rest.astype(np.uint8 if mantissa == 7 else words.dtype)
