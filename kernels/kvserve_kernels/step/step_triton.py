"""Centring of channels and quantisation with one constant step on a GPU, the bytes of `step_ref`.

Compiled with ``enable_fp_fusion=False``. Sums over tokens are one thread a channel, because their order is fixed.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen

_COLUMNS = 128
_TOKENS = 16
_VALUES = 2048
_LEAST_STEP = 2.0**-120


@triton.jit
def sums_kernel(x, out, tokens, columns, SQUARES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the values, or their squares, of `COLUMNS` columns of a layer over the tokens: means, or sums of squares."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    layer = tl.program_id(1).to(tl.int64)
    known = column < columns
    at = x + layer * tokens * columns + column
    total = tl.zeros([COLUMNS], tl.float64)
    for _ in range(tokens):
        v = widen(tl.load(at, mask=known, other=0)).to(tl.float64)
        # a square of float32 is exact in float64, so that fusing it with the sum changes nothing
        total += v * v if SQUARES else v
        at += columns
    to = out + layer * columns + column
    if SQUARES:
        tl.store(to, total, mask=known)
    else:
        mean = (total / tokens).to(tl.float32)
        tl.store(to, narrow(mean, out.dtype.element_ty), mask=known)


@triton.jit
def whole_kernel(of_columns, out, columns):  # type: ignore[no-untyped-def]
    """Sum the columns of one layer, in their order."""
    layer = tl.program_id(0).to(tl.int64)
    total = tl.zeros([1], tl.float64)
    one = tl.arange(0, 1)
    for j in range(columns):
        total += tl.load(of_columns + layer * columns + j + one)
    tl.store(out + layer + one, total)


@triton.jit
def shift_kernel(  # type: ignore[no-untyped-def]
    x,
    means,
    out,
    failed,
    tokens,
    columns,
    ADD: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Subtract the means from a block of tokens and columns, or add them again."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    layer = tl.program_id(2).to(tl.int64)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    place = (layer * tokens + token)[:, None] * columns + column[None, :]
    v = widen(tl.load(x + place, mask=inside, other=0))
    mean = widen(tl.load(means + layer * columns + column, mask=column < columns, other=0))
    if ADD:
        tl.store(out + place, narrow(v + mean[None, :], out.dtype.element_ty), mask=inside)
    else:
        v = v - mean[None, :]
        tl.store(out + place, v, mask=inside)
        fits = tl.abs(v) < float("inf")
        outside = tl.max(tl.max((inside & ~fits).to(tl.int32), 1), 0)
        tl.store(failed, 1, mask=outside > 0)


@triton.jit
def quantise_kernel(x, steps, codes, failed, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round `BLOCK` values of a layer to multiples of its step."""
    layer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(steps + layer)
    some = step > 0.0
    inverse = tl.where(some, tl.div_rn(step * 0.0 + 1.0, tl.where(some, step, 1.0)), 0.0)
    v = widen(tl.load(x + layer * count + i, mask=i < count, other=0)) * inverse
    fits = tl.abs(v) < 32767.5
    # a sum with 1.5 * 2**23 leaves the nearest integer, ties to even, in the low bits
    bits = (v + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(codes + layer * count + i, bits.to(tl.int16), mask=i < count)
    outside = tl.max(((i < count) & ~fits).to(tl.int32), 0)
    tl.store(failed, 1, mask=outside > 0)


@triton.jit
def dequantise_kernel(codes, steps, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply `BLOCK` codes of a layer by its step."""
    layer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + layer * count + i, mask=i < count, other=0).to(tl.float32)
    value = narrow(code * tl.load(steps + layer), out.dtype.element_ty)
    tl.store(out + layer * count + i, value, mask=i < count)


def centre(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Subtract from each channel its mean over the tokens.

    Args:
        x: ``[layers, tokens, columns]`` bfloat16 or float32, contiguous, finite.

    Returns:
        The differences, float32, and the means ``[layers, columns]``, rounded to the type of ``x`` before they are
        subtracted; None if a difference exceeds float32.
    """
    layers, tokens, columns = x.shape
    means = torch.empty((layers, columns), dtype=x.dtype, device=x.device)
    sums_kernel[(triton.cdiv(columns, _COLUMNS), layers)](
        as_bits(x), as_bits(means), tokens, columns, SQUARES=False, COLUMNS=_COLUMNS
    )
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    fits = _shifted(x, means, out, add=False)
    return (out, means) if fits else None


def uncentre(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Add the means again; the result has their type."""
    out = torch.empty(x.shape, dtype=means.dtype, device=x.device)
    _shifted(x, means, out, add=True)
    return out


def relative_steps(x: torch.Tensor, relative: float) -> torch.Tensor:
    """Return for each layer ``relative`` times the root mean square of its values, ``[layers]`` float32.

    A step below 2**-120, whose reciprocal float32 could not hold, becomes 0; one beyond float32, infinity.
    """
    layers, tokens, columns = x.shape
    squares = torch.empty((layers, columns), dtype=torch.float64, device=x.device)
    sums_kernel[(triton.cdiv(columns, _COLUMNS), layers)](
        as_bits(x), squares, tokens, columns, SQUARES=True, COLUMNS=_COLUMNS
    )
    whole = torch.empty(layers, dtype=torch.float64, device=x.device)
    whole_kernel[(layers,)](squares, whole, columns, num_warps=1)
    steps = ((whole / (tokens * columns)).sqrt() * relative).float()
    return torch.where(steps < _LEAST_STEP, 0.0, steps)


def quantise(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor | None:
    """Round each value to the nearest multiple of its layer's step, ties to even.

    Args:
        x: ``[layers, tokens, columns]`` bfloat16 or float32, contiguous, finite.
        steps: ``[layers]`` float32; a layer with step 0 becomes zeros.

    Returns:
        The multiples, int16; None if one exceeds 32,767.
    """
    layers, tokens, columns = x.shape
    count = tokens * columns
    codes = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    quantise_kernel[(triton.cdiv(count, _VALUES), layers)](
        as_bits(x), steps, codes, failed, count, BLOCK=_VALUES, enable_fp_fusion=False
    )
    return None if failed else codes


def dequantise(codes: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo `quantise`, to bfloat16 or float32."""
    layers, tokens, columns = codes.shape
    count = tokens * columns
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    dequantise_kernel[(triton.cdiv(count, _VALUES), layers)](
        codes, steps, as_bits(out), count, BLOCK=_VALUES
    )
    return out


def _shifted(x: torch.Tensor, means: torch.Tensor, out: torch.Tensor, *, add: bool) -> bool:
    """Add or subtract means; return whether all is finite."""
    layers, tokens, columns = x.shape
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    shift_kernel[(triton.cdiv(columns, _COLUMNS), triton.cdiv(tokens, _TOKENS), layers)](
        as_bits(x),
        as_bits(means),
        as_bits(out),
        failed,
        tokens,
        columns,
        ADD=add,
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
    )
    return not failed
