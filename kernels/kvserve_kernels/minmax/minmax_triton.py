"""Min-max quantisation on a GPU, the bytes of `minmax_ref`.

Compiled with ``enable_fp_fusion=False``: a product and the sum that follows round apart.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen

_VALUES = 2048
_COLUMNS = 128
_TOKENS = 16


@triton.jit
def scale_of(least, most, top):  # type: ignore[no-untyped-def]
    """Return codes a unit of value, 0 for a span that has no float32 reciprocal, and whether the span is finite."""
    span = most - least
    wide = span > 1e-34
    quotient = tl.div_rn(tl.zeros_like(span) + top, tl.where(wide, span, 1.0))
    return tl.where(wide, quotient, 0.0), span < float("inf")


@triton.jit
def encode_rows_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    lo,
    hi,
    failed,
    rows,
    dim,
    group,
    groups,
    top,
    GROUP: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """Quantise `SEVERAL` groups of neighbours within rows."""
    index = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    known = index < rows * groups
    start = (index % groups) * group
    j = tl.arange(0, GROUP)
    inside = known[:, None] & (j < group)[None, :] & (start[:, None] + j[None, :] < dim)
    place = ((index // groups) * dim + start)[:, None] + j[None, :]
    v = widen(tl.load(x + place, mask=inside, other=0)) + 0.0
    # in a group that does not exist all values are the zeros of the masked load
    counts = inside | ~known[:, None]
    least = tl.min(tl.where(counts, v, float("inf")), 1)
    most = tl.max(tl.where(counts, v, -float("inf")), 1)
    scale, fits = scale_of(least, most, top)
    code = ((v - least[:, None]) * scale[:, None] + 0.5).to(tl.int32)
    code = tl.minimum(code, top)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(lo + index, narrow(least + 0.0, lo.dtype.element_ty), mask=known)
    tl.store(hi + index, narrow(most + 0.0, hi.dtype.element_ty), mask=known)
    tl.store(failed + index * 0, tl.full([SEVERAL], 1, tl.int32), mask=known & ~fits)


@triton.jit
def decode_rows_kernel(  # type: ignore[no-untyped-def]
    codes,
    lo,
    hi,
    out,
    rows,
    dim,
    group,
    groups,
    top,
    GROUP: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """Restore `SEVERAL` groups of neighbours within rows."""
    index = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    known = index < rows * groups
    start = (index % groups) * group
    j = tl.arange(0, GROUP)
    inside = known[:, None] & (j < group)[None, :] & (start[:, None] + j[None, :] < dim)
    place = ((index // groups) * dim + start)[:, None] + j[None, :]
    least = widen(tl.load(lo + index, mask=known, other=0))
    most = widen(tl.load(hi + index, mask=known, other=0))
    step = tl.div_rn(most - least, tl.zeros_like(most) + top)
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32).to(tl.float32)
    value = least[:, None] + code * step[:, None]
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def encode_columns_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    lo,
    hi,
    failed,
    tokens,
    columns,
    group,
    top,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantise one group of successive tokens in `COLUMNS` columns of a layer."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    layer = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * group
    stop = tl.minimum(start + group, tokens)
    t = tl.arange(0, TOKENS)
    known = column < columns
    least = tl.full([TOKENS, COLUMNS], float("inf"), tl.float32)
    most = tl.full([TOKENS, COLUMNS], -float("inf"), tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + t
        inside = (token < stop)[:, None] & (column < columns)[None, :]
        place = (layer * tokens + token)[:, None] * columns + column[None, :]
        v = widen(tl.load(x + place, mask=inside, other=0)) + 0.0
        counts = inside | ~known[None, :]
        least = tl.minimum(least, tl.where(counts, v, float("inf")))
        most = tl.maximum(most, tl.where(counts, v, -float("inf")))
    low = tl.min(least, 0)
    high = tl.max(most, 0)
    scale, fits = scale_of(low, high, top)
    for first in range(start, stop, TOKENS):
        token = first + t
        inside = (token < stop)[:, None] & (column < columns)[None, :]
        place = (layer * tokens + token)[:, None] * columns + column[None, :]
        v = widen(tl.load(x + place, mask=inside, other=0)) + 0.0
        code = ((v - low[None, :]) * scale[None, :] + 0.5).to(tl.int32)
        code = tl.minimum(code, top)
        tl.store(codes + place, code.to(tl.uint8), mask=inside)
    to = (layer * tl.num_programs(1) + tl.program_id(1)) * columns + column
    tl.store(lo + to, narrow(low + 0.0, lo.dtype.element_ty), mask=known)
    tl.store(hi + to, narrow(high + 0.0, hi.dtype.element_ty), mask=known)
    tl.store(failed + column * 0, tl.full([COLUMNS], 1, tl.int32), mask=known & ~fits)


@triton.jit
def decode_columns_kernel(  # type: ignore[no-untyped-def]
    codes,
    lo,
    hi,
    out,
    tokens,
    columns,
    group,
    top,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Restore one group of successive tokens in `COLUMNS` columns of a layer."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    layer = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * group
    stop = tl.minimum(start + group, tokens)
    known = column < columns
    at = (layer * tl.num_programs(1) + tl.program_id(1)) * columns + column
    least = widen(tl.load(lo + at, mask=known, other=0))
    most = widen(tl.load(hi + at, mask=known, other=0))
    step = tl.div_rn(most - least, tl.zeros_like(most) + top)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = (token < stop)[:, None] & known[None, :]
        place = (layer * tokens + token)[:, None] * columns + column[None, :]
        code = tl.load(codes + place, mask=inside, other=0).to(tl.int32).to(tl.float32)
        value = least[None, :] + code * step[None, :]
        tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


def encode_rows(
    x: torch.Tensor, *, group: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Quantise groups of neighbours within each row.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite.
        group: Values a group, at most 16,384; the last group of a row may be shorter.
        levels: Number of codes, 2 to 256.

    Returns:
        Codes ``[rows, dim]`` uint8, and least and greatest values ``[rows, ceil(dim / group)]`` in the type of ``x``;
        None if a group spans more than float32 can hold.
    """
    rows, dim = x.shape
    groups = triton.cdiv(dim, group)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    lo = torch.empty((rows, groups), dtype=x.dtype, device=x.device)
    hi = torch.empty_like(lo)
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    block = triton.next_power_of_2(group)
    several = max(1, _VALUES // block)
    encode_rows_kernel[(triton.cdiv(rows * groups, several),)](
        as_bits(x),
        codes,
        as_bits(lo),
        as_bits(hi),
        failed,
        rows,
        dim,
        group,
        groups,
        levels - 1,
        GROUP=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return None if failed else (codes, lo, hi)


def decode_rows(
    codes: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, *, group: int, levels: int
) -> torch.Tensor:
    """Undo `encode_rows`; the result has the type of ``lo``."""
    rows, dim = codes.shape
    groups = triton.cdiv(dim, group)
    out = torch.empty(codes.shape, dtype=lo.dtype, device=codes.device)
    block = triton.next_power_of_2(group)
    several = max(1, _VALUES // block)
    decode_rows_kernel[(triton.cdiv(rows * groups, several),)](
        codes,
        as_bits(lo),
        as_bits(hi),
        as_bits(out),
        rows,
        dim,
        group,
        groups,
        levels - 1,
        GROUP=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out


def encode_columns(
    x: torch.Tensor, *, group: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Quantise groups of successive tokens within each column.

    Args:
        x: ``[layers, tokens, columns]`` bfloat16 or float32, contiguous, finite.
        group: Tokens a group; the last group may be shorter.
        levels: Number of codes, 2 to 256.

    Returns:
        Codes in the shape of ``x`` as uint8, and least and greatest values ``[layers, ceil(tokens / group), columns]``
        in the type of ``x``; None if a group spans more than float32 can hold.
    """
    layers, tokens, columns = x.shape
    groups = triton.cdiv(tokens, group)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    lo = torch.empty((layers, groups, columns), dtype=x.dtype, device=x.device)
    hi = torch.empty_like(lo)
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    encode_columns_kernel[(triton.cdiv(columns, _COLUMNS), groups, layers)](
        as_bits(x),
        codes,
        as_bits(lo),
        as_bits(hi),
        failed,
        tokens,
        columns,
        group,
        levels - 1,
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        enable_fp_fusion=False,
    )
    return None if failed else (codes, lo, hi)


def decode_columns(
    codes: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, *, group: int, levels: int
) -> torch.Tensor:
    """Undo `encode_columns`; the result has the type of ``lo``."""
    layers, tokens, columns = codes.shape
    out = torch.empty(codes.shape, dtype=lo.dtype, device=codes.device)
    decode_columns_kernel[(triton.cdiv(columns, _COLUMNS), lo.shape[1], layers)](
        codes,
        as_bits(lo),
        as_bits(hi),
        as_bits(out),
        tokens,
        columns,
        group,
        levels - 1,
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        enable_fp_fusion=False,
    )
    return out
