"""The definition of finiteness."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import widen


def all_finite(values: NDArray[Any], dtype: str) -> bool:
    """Tell whether no value is NaN or infinite; ``dtype`` says what 16-bit words mean."""
    return bool(np.isfinite(widen(values) if dtype == "bfloat16" else values).all())
