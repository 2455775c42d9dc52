"""Conversion to and from e4m3fn on a GPU, by the integer arithmetic of `fp8_cpu`; the bytes of `fp8_ref`.

Not by the hardware's own conversion: that saturates and rounds the same way, but not on every generation.
Compiled with ``enable_fp_fusion=False``.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen

_VALUES = 2048


@triton.jit
def encode_kernel(  # type: ignore[no-untyped-def]
    x, codes, peaks, rows, dim, SCALED: tl.constexpr, DIM: tl.constexpr, SEVERAL: tl.constexpr
):
    """Round `SEVERAL` rows."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    v = widen(tl.load(x + place, mask=inside, other=0))
    if SCALED:
        peak = tl.max(tl.abs(v), 1)
        tl.store(peaks + row, narrow(peak, peaks.dtype.element_ty), mask=row < rows)
        usual = peak > 1e-34
        quotient = tl.div_rn(tl.full([SEVERAL], 448.0, tl.float32), tl.where(usual, peak, 1.0))
        v = v * tl.where(usual, quotient, 0.0)[:, None]
    sign = (v.to(tl.uint32, bitcast=True) >> 24) & 0x80
    a = tl.minimum(tl.abs(v), 448.0)
    bits = a.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # adding 2**14 leaves multiples of 2**-9, the least subnormal, in the low bits
    small = (a + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = sign | tl.where(a >= 0.015625, normal, small)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def decode_kernel(  # type: ignore[no-untyped-def]
    codes, peaks, out, rows, dim, SCALED: tl.constexpr, DIM: tl.constexpr, SEVERAL: tl.constexpr
):
    """Restore `SEVERAL` rows."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    code = tl.load(codes + place, mask=inside, other=0).to(tl.uint32)
    # the exponent is rebiased by a product with 2**120, which makes subnormals come out right
    value = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    if SCALED:
        peak = widen(tl.load(peaks + row, mask=row < rows, other=0))
        value = value * tl.div_rn(peak, tl.full([SEVERAL], 448.0, tl.float32))[:, None]
    # a sign set by its bit: Triton's minus makes 0 of 0
    value = (value.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


def encode(x: torch.Tensor, *, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each value to the nearest e4m3 number, ties to even; beyond the largest, to the largest.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite.
        scaled: Scale each row so that its greatest magnitude becomes 448.

    Returns:
        Codes ``[rows, dim]`` uint8, and the greatest magnitude of each row ``[rows]`` in the type of ``x`` (empty if
        not scaled).
    """
    rows, dim = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    peaks = torch.empty(rows if scaled else 0, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    encode_kernel[(triton.cdiv(rows, several),)](
        as_bits(x),
        codes,
        as_bits(peaks),
        rows,
        dim,
        SCALED=scaled,
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return codes, peaks


def decode(codes: torch.Tensor, peaks: torch.Tensor, *, scaled: bool) -> torch.Tensor:
    """Undo `encode`; the result has the type of ``peaks``."""
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
        SCALED=scaled,
        DIM=block,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out
