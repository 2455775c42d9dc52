"""Means over tokens and values of components on a GPU, the bits of `mean_ref`.

Compiled with ``enable_fp_fusion=False``. Sums are one thread a channel, because their order is fixed.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, widen
from kvserve_kernels.mean.mean_ref import NEAR
from kvserve_kernels.mean.turning import Turning

_WIDTH = 128


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    x,
    own,
    other,
    total,
    total_other,
    tokens,
    token_stride,
    width,
    TURNS: tl.constexpr,
    NEAR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum `WIDTH` channels over the tokens, by the weights of a turning if `TURNS`."""
    j = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    known = j < width
    far = tl.zeros([WIDTH], tl.float64)
    far_other = tl.zeros([WIDTH], tl.float64)
    row = x + j
    first = own + j
    second = other + j
    for start in range(0, tokens, NEAR):
        near = tl.zeros([WIDTH], tl.float32)
        near_other = tl.zeros([WIDTH], tl.float32)
        for i in tl.static_range(NEAR):
            inside = known & (start + i < tokens)
            v = widen(tl.load(row, mask=inside, other=0))
            if TURNS:
                near += v * tl.load(first, mask=inside, other=0.0)
                near_other += v * tl.load(second, mask=inside, other=0.0)
                first += width
                second += width
            else:
                near += v
            row += token_stride
        far += near.to(tl.float64)
        far_other += near_other.to(tl.float64)
    tl.store(total + j, far, mask=known)
    if TURNS:
        tl.store(total_other + j, far_other, mask=known)


@triton.jit
def combine_kernel(levels, rows, total, components, width, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum the rows of all components, each times its level, in `WIDTH` channels."""
    j = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    far = tl.zeros([WIDTH], tl.float64)
    row = rows + j
    for c in range(components):
        level = tl.load(levels + c)
        # most are zero, and their rows are not read
        v = widen(tl.load(row, mask=(j < width) & (level != 0), other=0))
        # 15 bits times 8: exact, so that fusing it with the sum changes nothing
        far += v.to(tl.float64) * level.to(tl.float64)
        row += width
    tl.store(total + j, far, mask=j < width)


def token_means(row: torch.Tensor, turning: Turning | None) -> torch.Tensor:
    """Return the mean over tokens of one layer's keys, turned back, or values.

    Args:
        row: ``[tokens, heads, dim]`` bfloat16, float16 or float32; a token's values contiguous.
        turning: How keys turn; None for values and keys that do not.

    Returns:
        ``[heads, dim]`` float32; not finite if a value is not.
    """
    tokens, width = row.shape[0], row.shape[1] * row.shape[2]
    total = torch.empty(width, dtype=torch.float64, device=row.device)
    across = torch.empty_like(total)
    own = other = torch.empty(0, dtype=torch.float32, device=row.device)
    if turning is not None:
        own, other = (torch.from_numpy(of).to(row.device) for of in (turning.own, turning.other))
    sums_kernel[(triton.cdiv(width, _WIDTH),)](
        as_bits(row),
        own,
        other,
        total,
        across,
        tokens,
        row.stride(0),
        width,
        TURNS=turning is not None,
        NEAR=NEAR,
        WIDTH=_WIDTH,
        enable_fp_fusion=False,
    )
    if turning is not None:
        partner, sign = (
            torch.from_numpy(of).to(row.device) for of in (turning.partner, turning.sign)
        )
        total += sign * across[partner]
    return (total / tokens).float().view(row.shape[1:])


def combine(levels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``levels [components] · rows [components, width]`` in float64.

    Args:
        levels: int16.
        rows: bfloat16, contiguous, finite.
    """
    components, width = rows.shape
    total = torch.empty(width, dtype=torch.float64, device=rows.device)
    combine_kernel[(triton.cdiv(width, _WIDTH),)](
        levels, as_bits(rows), total, components, width, WIDTH=_WIDTH
    )
    return total
