"""The definition of centring and of constant-step quantisation; sums in one order, in float64."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits_ref import narrow, widen

LARGEST_CODE = 32_767


def centre(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any]] | None:
    """Subtract from each channel of ``[layers, tokens, columns]`` its mean over the tokens."""
    wide = widen(x)
    sums = np.cumsum(wide.astype(np.float64), axis=1)[:, -1] + 0.0  # a sum starts at +0
    means = narrow((sums / x.shape[1]).astype(np.float32), x.dtype)
    with np.errstate(over="ignore"):
        out = wide - widen(means)[:, None]
    return (out, means) if np.isfinite(out).all() else None


def uncentre(x: NDArray[np.float32], means: NDArray[Any]) -> NDArray[Any]:
    """Add the means again; the result has their type."""
    return narrow(x + widen(means)[:, None], means.dtype)


def relative_steps(x: NDArray[Any], relative: float) -> NDArray[np.float32]:
    """Return ``relative`` times each layer's root mean square."""
    squares = widen(x).astype(np.float64) ** 2
    of_columns = np.cumsum(squares, axis=1)[:, -1]
    means = np.cumsum(of_columns, axis=1)[:, -1] / (x.shape[1] * x.shape[2])
    steps: NDArray[np.float32] = (np.sqrt(means) * relative).astype(np.float32)
    return np.where(steps < 2.0**-120, np.float32(0), steps)


def quantise(x: NDArray[Any], steps: NDArray[np.float32]) -> NDArray[np.int16] | None:
    """Round each value to the nearest multiple of its layer's step, ties to even; None beyond int16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(steps > 0, np.float32(1) / steps, np.float32(0))[:, None, None]
        multiples = np.rint(widen(x) * inverse)
    fits = (np.abs(multiples) <= LARGEST_CODE).all()
    return multiples.astype(np.int16) if fits else None


def dequantise(codes: NDArray[np.int16], steps: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Undo `quantise`."""
    return narrow(codes.astype(np.float32) * steps[:, None, None], dtype)
