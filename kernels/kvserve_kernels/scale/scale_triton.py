"""Scaling of rows by a power of the square root of two on a GPU, the bytes of `scale_ref`."""

from functools import cache

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen
from kvserve_kernels.scale.scale_cpu import FACTORS, INVERSES
from kvserve_kernels.sums_triton import mean_squares

_VALUES = 2048
_ROWS = 128


@triton.jit
def exponents_kernel(x, exponents, failed, rows, dim, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the exponent of the mean square of `ROWS` rows, one a thread."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bits = mean_squares(x, row, rows, dim).to(tl.float32).to(tl.uint32, bitcast=True)
    exponent = bits >> 23
    known = row < rows
    tl.store(exponents + row, exponent.to(tl.uint8), mask=known)
    tl.store(failed + row * 0, tl.full([ROWS], 1, tl.int32), mask=known & (exponent >= 255))


@triton.jit
def multiply_kernel(  # type: ignore[no-untyped-def]
    x, table, exponents, out, rows, dim, DIM: tl.constexpr, SEVERAL: tl.constexpr
):
    """Multiply `SEVERAL` rows by what a table has at their exponents."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    j = tl.arange(0, DIM)
    inside = (row < rows)[:, None] & (j < dim)[None, :]
    place = row[:, None] * dim + j[None, :]
    exponent = tl.load(exponents + row, mask=row < rows, other=0).to(tl.int32)
    value = widen(tl.load(x + place, mask=inside, other=0)) * tl.load(table + exponent)[:, None]
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


def scale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Divide each row by ``sqrt(2 ** (e - 127))``, where e is the float32 exponent of its mean square.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous, finite; dim at most 16,384.

    Returns:
        The quotients, float32, of mean square 1 to 2 (0 for a row of zeros), and the exponents ``[rows]`` uint8; None
        if a mean square exceeds float32.
    """
    rows, dim = x.shape
    exponents = torch.empty(rows, dtype=torch.uint8, device=x.device)
    failed = torch.zeros(1, dtype=torch.int32, device=x.device)
    exponents_kernel[(triton.cdiv(rows, _ROWS),)](
        as_bits(x), exponents, failed, rows, dim, ROWS=_ROWS
    )
    if failed:
        return None
    return _multiplied(x, _tables(x.device)[1], exponents, torch.float32), exponents


def unscale(x: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo `scale`, to bfloat16 or float32."""
    return _multiplied(x, _tables(x.device)[0], exponents, dtype)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors and inverses by exponent, ``[256]`` float32 each."""
    return torch.from_numpy(FACTORS).to(device), torch.from_numpy(INVERSES).to(device)


def _multiplied(
    x: torch.Tensor, table: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    rows, dim = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(dim)
    several = max(1, _VALUES // block)
    multiply_kernel[(triton.cdiv(rows, several),)](
        as_bits(x),
        table,
        exponents,
        as_bits(out),
        rows,
        dim,
        DIM=block,
        SEVERAL=several,
    )
    return out
