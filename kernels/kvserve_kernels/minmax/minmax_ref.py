"""The definition of min-max quantisation, group by group.

Rows ``[rows, dim]`` and columns ``[layers, tokens, columns]`` are both grouped along their second dimension, so one
definition serves both.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen

_LEAST_RANGE = np.float32(1e-34)
Coded = tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]


def encode(x: NDArray[Any], *, group: int, levels: int) -> Coded | None:
    """Quantise groups along the second dimension; None if one spans more than float32 can hold."""
    parts = []
    for start in range(0, x.shape[1], group):
        part = widen(x[:, start : start + group]) + np.float32(0)
        least, most = part.min(1, keepdims=True), part.max(1, keepdims=True)
        with np.errstate(over="ignore", divide="ignore"):
            span = most - least
            scale = np.where(span > _LEAST_RANGE, np.float32(levels - 1) / span, np.float32(0))
        if not np.isfinite(span).all():
            return None
        scaled = (part - least) * scale + np.float32(0.5)
        codes = np.minimum(scaled.astype(np.int32), levels - 1).astype(np.uint8)
        parts.append((codes, narrow(least, x.dtype), narrow(most, x.dtype)))
    codes, lo, hi = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    return codes, lo, hi


def decode(
    codes: NDArray[np.uint8], lo: NDArray[Any], hi: NDArray[Any], *, group: int, levels: int
) -> NDArray[Any]:
    """Undo `encode`."""
    of = np.arange(codes.shape[1]) // group
    least, most = widen(lo)[:, of], widen(hi)[:, of]
    step = (most - least) / np.float32(levels - 1)
    return narrow(least + codes.astype(np.float32) * step, lo.dtype)
