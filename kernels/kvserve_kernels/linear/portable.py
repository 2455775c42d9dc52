"""The linear transform on any CPU: gathering and rounding by numba, products by BLAS.

The integer product runs in float32: a block of 1,024 products of int8 sums to less than 2^24, where float32 is exact
in whatever order BLAS adds. It is numpy's product because a setting of torch may lower float32 products to bfloat16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import bits_ref
from kvserve_kernels.bits import float_bits, narrow, widen
from kvserve_kernels.jit import njit
from kvserve_kernels.linear.plan import MAX_LEVEL, MAX_SHIFT, Plan

_EXACT_PRODUCTS = 1024
_BLOCK_TOKENS = 256
_MAGIC = np.float32(12_582_912.0)
_LARGEST_HALF = np.float32(65504)
_MOST = np.float32(MAX_LEVEL)


@njit
def _prepare(  # type: ignore[no-untyped-def]
    native,
    rows,
    heads,
    rotations,
    mean,
    inv_scale,
    cos,
    sin,
    interleaved,
    start,
    x8,
    powers,
):
    tokens, width = x8.shape
    dim = native.shape[3]
    pairs = cos.shape[2]
    scaled = np.empty(width, np.float32)
    magic = float_bits(_MAGIC)
    for i in range(tokens):
        t = start + i
        for s in range(rows.shape[0]):
            part = native[rows[s], t, heads[s]]
            to = scaled[s * dim : (s + 1) * dim]
            for j in range(dim):
                to[j] = widen(part[j])
            if rotations[s] >= 0:
                c, n = cos[rotations[s], t], sin[rotations[s], t]
                if interleaved:
                    for j in range(pairs):
                        a, b = to[2 * j], to[2 * j + 1]
                        to[2 * j] = a * c[j] + b * n[j]
                        to[2 * j + 1] = b * c[j] - a * n[j]
                else:
                    for j in range(pairs):
                        a, b = to[j], to[j + pairs]
                        to[j] = a * c[j] + b * n[j]
                        to[j + pairs] = b * c[j] - a * n[j]
        # magnitudes compare as their bits do, and NaN is greater than all
        peak = np.uint32(0)
        for j in range(width):
            v = (scaled[j] - mean[j]) * inv_scale[j]
            scaled[j] = v
            bits = float_bits(v) & np.uint32(0x7FFFFFFF)
            peak = bits if bits > peak else peak
        # the exponent of the least 127 * 2**e that is no smaller
        e = np.int64((peak + np.uint32(0x1FFFF)) >> np.uint32(23)) - 133
        if e > MAX_SHIFT:
            return False
        power = np.float32(1)
        for _ in range(e):
            power *= np.float32(2)
        powers[i] = power
        down = np.float32(1) / power
        for j in range(width):
            x8[i, j] = np.int8(np.int32(float_bits(scaled[j] * down + _MAGIC) - magic))
    return True


@njit
def _quantise(y, powers, factor, offset, start, levels):  # type: ignore[no-untyped-def]
    components, tokens = y.shape
    for c in range(components):
        to = levels[c, start : start + tokens]
        for i in range(tokens):
            v = y[c, i]
            magnitude = np.float32(abs(v)) * powers[i] * factor[c] + offset[c]
            level = np.int32(magnitude if magnitude < _MOST else _MOST)
            to[i] = np.int16(-level if v < 0 else level)


@njit
def _dequantise(levels, start, delta, unit, out):  # type: ignore[no-untyped-def]
    components, tokens = out.shape
    like = np.uint16(0)
    for c in range(components):
        row = levels[c, start : start + tokens]
        for i in range(tokens):
            q = np.float32(row[i])
            r = (abs(q) + delta[c]) * unit if q != 0 else np.float32(0)
            out[c, i] = widen(narrow(-r if q < 0 else r, like))


@njit
def _finish(  # type: ignore[no-untyped-def]
    x, rows, heads, rotations, mean, cos, sin, interleaved, start, out
):
    tokens = x.shape[0]
    dim = out.shape[3]
    pairs = cos.shape[2]
    like = out[0, 0, 0, 0]
    for i in range(tokens):
        t = start + i
        for s in range(rows.shape[0]):
            whole = x[i, s * dim : (s + 1) * dim]
            for j in range(dim):
                whole[j] += mean[s * dim + j]
            if rotations[s] >= 0:
                c, n = cos[rotations[s], t], sin[rotations[s], t]
                if interleaved:
                    for j in range(pairs):
                        a, b = whole[2 * j], whole[2 * j + 1]
                        whole[2 * j] = a * c[j] - b * n[j]
                        whole[2 * j + 1] = b * c[j] + a * n[j]
                else:
                    for j in range(pairs):
                        a, b = whole[j], whole[j + pairs]
                        whole[j] = a * c[j] - b * n[j]
                        whole[j + pairs] = b * c[j] + a * n[j]
            to = out[rows[s], t, heads[s]]
            for j in range(dim):
                to[j] = narrow(whole[j], like)


def forward(
    native: NDArray[Any],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
) -> NDArray[np.int16] | None:
    """Map values to levels; see `linear_cpu.forward`."""
    piece = _plain(native.astype(np.float32) if native.dtype == np.float16 else native)
    cos, sin = _plain(cos), _plain(sin)
    tokens = piece.shape[1]
    levels = np.empty((plan.components, tokens), np.int16)
    for group, at in zip(plan.groups, plan.starts, strict=False):
        to = levels[at : at + group.components]
        matrix = group.matrix.astype(np.float32)
        for start in range(0, tokens, _BLOCK_TOKENS):
            count = min(_BLOCK_TOKENS, tokens - start)
            x8 = np.empty((count, group.width), np.int8)
            powers = np.empty(count, np.float32)
            if not _prepare(
                piece,
                group.rows,
                group.heads,
                group.rotations,
                group.mean,
                group.inv_scale,
                cos,
                sin,
                interleaved,
                start,
                x8,
                powers,
            ):
                return None
            _quantise(_product(matrix, x8), powers, group.factor, group.offset, start, to)
    return levels


def _product(matrix: NDArray[np.float32], x8: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return ``matrix [C, W] · x8 [tokens, W]`` transposed, ``[C, tokens]``, exactly."""
    total = np.zeros((matrix.shape[0], x8.shape[0]), np.int32)
    for k in range(0, matrix.shape[1], _EXACT_PRODUCTS):
        block = slice(k, k + _EXACT_PRODUCTS)
        total += (matrix[:, block] @ x8[:, block].astype(np.float32).T).astype(np.int32)
    return total


def inverse(
    levels: NDArray[np.int16],
    plan: Plan,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interleaved: bool,
    out: NDArray[Any],
) -> None:
    """Map levels to values; see `linear_cpu.inverse`."""
    in_place = out.flags.c_contiguous and out.dtype != np.float16
    piece = (
        out
        if in_place
        else np.empty(out.shape, np.float32 if out.dtype == np.float16 else out.dtype)
    )
    levels, cos, sin = _plain(levels), _plain(cos), _plain(sin)
    tokens = out.shape[1]
    for group, at in zip(plan.groups, plan.starts, strict=False):
        part = levels[at : at + group.components]
        rounded = bits_ref.widen(group.inverse_bits)
        for start in range(0, tokens, _BLOCK_TOKENS):
            r = np.empty((group.components, min(_BLOCK_TOKENS, tokens - start)), np.float32)
            _dequantise(part, start, group.delta, np.float32(group.unit), r)
            _finish(
                r.T @ rounded,
                group.rows,
                group.heads,
                group.rotations,
                group.mean,
                cos,
                sin,
                interleaved,
                start,
                piece,
            )
        if not in_place:
            for row, head in zip(group.rows, group.heads, strict=True):
                out[row, :, head] = _stored(piece[row, :, head], out.dtype)


def _stored(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return values in a type of a piece, float16 held at its largest finite number."""
    if dtype != np.float16:
        return values
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array for which numba has compiled already: contiguous, and not read-only."""
    return np.require(array, requirements=["C", "W"])
