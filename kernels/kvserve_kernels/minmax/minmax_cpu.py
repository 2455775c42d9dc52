"""Min-max quantisation on the CPU: each group of values to n codes spread evenly from its least to its greatest.

The least and greatest value are values of the group, so they are exact in the cache's own dtype, and every code
decodes to within half a step of its value.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.bits import narrow, widen
from kvserve_kernels.jit import njit

# A range too small to have a float32 reciprocal step is coded as zeros: the error is below it.
_LEAST_RANGE = np.float32(1e-34)
# adding it turns -0 into 0: which of the two is the least depends on the order of comparison
_ZERO = np.float32(0)


@njit
def _encode_rows(x, group, top, codes, lo, hi):  # type: ignore[no-untyped-def]
    rows, dim = x.shape
    top_f = np.float32(top)
    half = np.float32(0.5)
    for r in range(rows):
        for g in range(lo.shape[1]):
            start = g * group
            stop = min(start + group, dim)
            least = widen(x[r, start])
            most = least
            for j in range(start, stop):
                v = widen(x[r, j])
                least = v if v < least else least
                most = v if v > most else most
            span = most - least
            if not span < np.float32(np.inf):
                return False
            lo[r, g] = narrow(least + _ZERO, lo[0, 0])
            hi[r, g] = narrow(most + _ZERO, hi[0, 0])
            scale = top_f / span if span > _LEAST_RANGE else np.float32(0)
            for j in range(start, stop):
                q = np.int32((widen(x[r, j]) - least) * scale + half)
                codes[r, j] = np.uint8(min(q, top))
    return True


@njit
def _decode_rows(codes, group, top, lo, hi, out):  # type: ignore[no-untyped-def]
    rows, dim = codes.shape
    top_f = np.float32(top)
    for r in range(rows):
        for g in range(lo.shape[1]):
            least = widen(lo[r, g])
            step = (widen(hi[r, g]) - least) / top_f
            for j in range(g * group, min(g * group + group, dim)):
                value = least + np.float32(np.int32(codes[r, j])) * step
                out[r, j] = narrow(value, out[0, 0])


@njit
def _encode_columns(x, group, top, codes, lo, hi):  # type: ignore[no-untyped-def]
    layers, tokens, columns = x.shape
    top_f = np.float32(top)
    half = np.float32(0.5)
    least = np.empty(columns, np.float32)
    most = np.empty(columns, np.float32)
    scale = np.empty(columns, np.float32)
    for layer in range(layers):
        for g in range(lo.shape[1]):
            start = g * group
            stop = min(start + group, tokens)
            for j in range(columns):
                least[j] = widen(x[layer, start, j])
                most[j] = least[j]
            for t in range(start + 1, stop):
                for j in range(columns):
                    v = widen(x[layer, t, j])
                    least[j] = v if v < least[j] else least[j]
                    most[j] = v if v > most[j] else most[j]
            fits = True
            for j in range(columns):
                span = most[j] - least[j]
                fits &= span < np.float32(np.inf)
                lo[layer, g, j] = narrow(least[j] + _ZERO, lo[0, 0, 0])
                hi[layer, g, j] = narrow(most[j] + _ZERO, hi[0, 0, 0])
                scale[j] = top_f / span if span > _LEAST_RANGE else np.float32(0)
            if not fits:
                return False
            for t in range(start, stop):
                for j in range(columns):
                    q = np.int32((widen(x[layer, t, j]) - least[j]) * scale[j] + half)
                    codes[layer, t, j] = np.uint8(min(q, top))
    return True


@njit
def _decode_columns(codes, group, top, lo, hi, out):  # type: ignore[no-untyped-def]
    layers, tokens, columns = codes.shape
    top_f = np.float32(top)
    least = np.empty(columns, np.float32)
    step = np.empty(columns, np.float32)
    for layer in range(layers):
        for g in range(lo.shape[1]):
            for j in range(columns):
                least[j] = widen(lo[layer, g, j])
                step[j] = (widen(hi[layer, g, j]) - least[j]) / top_f
            for t in range(g * group, min(g * group + group, tokens)):
                for j in range(columns):
                    value = least[j] + np.float32(np.int32(codes[layer, t, j])) * step[j]
                    out[layer, t, j] = narrow(value, out[0, 0, 0])


def encode_rows(
    x: NDArray[Any], *, group: int, levels: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]] | None:
    """Quantise groups of neighbours within each row.

    Args:
        x: ``[rows, dim]`` float32, or uint16 holding bfloat16 bits; finite.
        group: Values a group; the last group of a row may be shorter.
        levels: Number of codes, 2 to 256.

    Returns:
        Codes ``[rows, dim]`` uint8, and least and greatest values ``[rows, ceil(dim / group)]`` in the type of ``x``;
        None if a group spans more than float32 can hold.
    """
    codes = np.empty(x.shape, np.uint8)
    lo = np.empty((x.shape[0], -(-x.shape[1] // group)), x.dtype)
    hi = np.empty_like(lo)
    return (codes, lo, hi) if _encode_rows(x, group, levels - 1, codes, lo, hi) else None


def decode_rows(
    codes: NDArray[np.uint8], lo: NDArray[Any], hi: NDArray[Any], *, group: int, levels: int
) -> NDArray[Any]:
    """Undo `encode_rows`; the result has the type of ``lo`` and is always finite for finite ``lo``, ``hi``."""
    out = np.empty(codes.shape, lo.dtype)
    _decode_rows(codes, group, levels - 1, lo, hi, out)
    return out


def encode_columns(
    x: NDArray[Any], *, group: int, levels: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]] | None:
    """Quantise groups of successive tokens within each column.

    Args:
        x: ``[layers, tokens, columns]`` float32, or uint16 holding bfloat16 bits; finite.
        group: Tokens a group; the last group may be shorter.
        levels: Number of codes, 2 to 256.

    Returns:
        Codes in the shape of ``x`` as uint8, and least and greatest values ``[layers, ceil(tokens / group), columns]``
        in the type of ``x``; None if a group spans more than float32 can hold.
    """
    codes = np.empty(x.shape, np.uint8)
    lo = np.empty((x.shape[0], -(-x.shape[1] // group), x.shape[2]), x.dtype)
    hi = np.empty_like(lo)
    return (codes, lo, hi) if _encode_columns(x, group, levels - 1, codes, lo, hi) else None


def decode_columns(
    codes: NDArray[np.uint8], lo: NDArray[Any], hi: NDArray[Any], *, group: int, levels: int
) -> NDArray[Any]:
    """Undo `encode_columns`; the result has the type of ``lo``."""
    out = np.empty(codes.shape, lo.dtype)
    _decode_columns(codes, group, levels - 1, lo, hi, out)
    return out
