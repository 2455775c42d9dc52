"""Quantisation to centroids on a GPU, the bytes of `lloyd_ref`; compiled with ``enable_fp_fusion=False``."""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen
from kvserve_kernels.sums_triton import mean_squares

_VALUES = 2048
_ROWS = 128


@triton.jit
def roots_kernel(x, out, failed, rows, dim, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the root mean square of `ROWS` rows, one a thread."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    root = tl.sqrt(mean_squares(x, row, rows, dim)).to(tl.float32)
    known = row < rows
    tl.store(out + row, narrow(root, out.dtype.element_ty), mask=known)
    fits = root < float("inf")
    tl.store(failed + row * 0, tl.full([ROWS], 1, tl.int32), mask=known & ~fits)


@triton.jit
def encode_kernel(  # type: ignore[no-untyped-def]
    x,
    scales,
    thresholds,
    codes,
    rows,
    dim,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """Count for each value of `SEVERAL` rows the thresholds below it."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    scale = widen(tl.load(scales + row, mask=row < rows, other=0))
    usual = scale > 1e-34
    inverse = tl.div_rn(tl.full([SEVERAL], 1.0, tl.float32), tl.where(usual, scale, 1.0))
    inverse = tl.where(usual, inverse, 0.0)
    scaled = widen(tl.load(x + place, mask=inside, other=0)) * inverse[:, None]
    code = tl.zeros([SEVERAL, DIM], tl.int32)
    for k in tl.static_range(COUNT):
        code += (scaled > tl.load(thresholds + k)).to(tl.int32)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def decode_kernel(  # type: ignore[no-untyped-def]
    codes, scales, centroids, out, rows, dim, last, DIM: tl.constexpr, SEVERAL: tl.constexpr
):
    """Restore `SEVERAL` rows."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    code = tl.minimum(tl.load(codes + place, mask=inside, other=0).to(tl.int32), last)
    scale = widen(tl.load(scales + row, mask=row < rows, other=0))
    value = tl.load(centroids + code) * scale[:, None]
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


def root_mean_squares(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the root mean square of each row.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite.
        dtype: Of the result: bfloat16 or float32.

    Returns:
        ``[rows]``, summed in float64 from left to right; None if one exceeds float32.
    """
    rows, dim = x.shape
    out = torch.empty(rows, dtype=dtype, device=x.device)
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    roots_kernel[(triton.cdiv(rows, _ROWS),)](
        as_bits(x), as_bits(out), failed, rows, dim, ROWS=_ROWS
    )
    return None if failed else out


def encode(x: torch.Tensor, scales: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Return for each value, divided by its row's scale, how many thresholds lie below it.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite; dim at most 16,384.
        scales: ``[rows]`` bfloat16 or float32, not negative.
        thresholds: ``[count]`` float32, rising; a kernel is compiled for each count.
    """
    rows, dim = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    encode_kernel[(triton.cdiv(rows, several),)](
        as_bits(x),
        as_bits(scales),
        thresholds,
        codes,
        rows,
        dim,
        COUNT=thresholds.numel(),
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return codes


def decode(
    codes: torch.Tensor, scales: torch.Tensor, centroids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return each code's centroid times its row's scale in bfloat16 or float32, always finite.

    A code past the last centroid counts as the last.
    """
    rows, dim = codes.shape
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    decode_kernel[(triton.cdiv(rows, several),)](
        codes,
        as_bits(scales),
        centroids,
        as_bits(out),
        rows,
        dim,
        centroids.numel() - 1,
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out
