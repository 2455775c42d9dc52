"""Symmetric quantisation of rows on a GPU, the bytes of `absmax_ref`; compiled with ``enable_fp_fusion=False``."""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen

_VALUES = 2048


@triton.jit
def encode_kernel(x, codes, peaks, rows, dim, top, DIM: tl.constexpr, SEVERAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantise `SEVERAL` rows."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    v = widen(tl.load(x + place, mask=inside, other=0))
    peak = tl.max(tl.abs(v), 1)
    tl.store(peaks + row, narrow(peak, peaks.dtype.element_ty), mask=row < rows)
    usual = peak > 1e-34
    most = tl.zeros_like(peak) + top
    factor = tl.where(usual, tl.div_rn(most, tl.where(usual, peak, 1.0)), 0.0)
    # a sum with 1.5 * 2**23 leaves the nearest integer, ties to even, in the low bits
    bits = ((v * factor[:, None] + most[:, None]) + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(codes + place, bits.to(tl.uint8), mask=inside)


@triton.jit
def decode_kernel(codes, peaks, out, rows, dim, top, DIM: tl.constexpr, SEVERAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Restore `SEVERAL` rows."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    peak = widen(tl.load(peaks + row, mask=row < rows, other=0))
    part = (code - top).to(tl.float32)
    part = tl.div_rn(part, tl.zeros_like(part) + top)
    tl.store(out + place, narrow(part * peak[:, None], out.dtype.element_ty), mask=inside)


def encode(x: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to ``2 * (bins // 2) - 1`` codes that are symmetric about zero.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite; dim at most 16,384.
        bins: 4 to 256.

    Returns:
        Codes ``[rows, dim]`` uint8, of which ``bins // 2 - 1`` means 0, and the greatest magnitudes ``[rows]`` in the
        type of ``x``.
    """
    rows, dim = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    peaks = torch.empty(rows, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    encode_kernel[(triton.cdiv(rows, several),)](
        as_bits(x),
        codes,
        as_bits(peaks),
        rows,
        dim,
        bins // 2 - 1,
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return codes, peaks


def decode(codes: torch.Tensor, peaks: torch.Tensor, bins: int) -> torch.Tensor:
    """Undo `encode`; the result has the type of ``peaks`` and is finite for finite peaks."""
    rows, dim = codes.shape
    out = torch.empty(codes.shape, dtype=peaks.dtype, device=codes.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    decode_kernel[(triton.cdiv(rows, several),)](
        codes,
        as_bits(peaks),
        as_bits(out),
        rows,
        dim,
        bins // 2 - 1,
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out
