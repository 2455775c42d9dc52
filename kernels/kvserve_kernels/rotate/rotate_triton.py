"""Rotation and its undoing on a GPU, the bits of `rotate_ref`; compiled with ``enable_fp_fusion=False``."""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen

_PAIRS = 1024


@triton.jit
def pair_members(k, DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the members of pair k lie in a head; what does not rotate is made pairs of, too."""
    if INTERLEAVED:
        first = 2 * k
        second = 2 * k + 1
    elif PAIRS == 0 or 2 * PAIRS == DIM:
        first = k
        second = k + DIM // 2
    else:
        first = tl.where(k < PAIRS, k, k + PAIRS)
        second = tl.where(k < PAIRS, k + PAIRS, k + DIM // 2)
    return first, second


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    rows,
    tokens,
    heads,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNDO: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """Turn `SEVERAL` heads, back if `UNDO`."""
    row = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    k = tl.arange(0, HALF)[None, :]
    first, second = pair_members(k, DIM, PAIRS, INTERLEAVED)
    inside = (row < rows)[:, None] & (k < DIM // 2)
    turns = inside & (k < PAIRS)
    a = widen(tl.load(x + row[:, None] * DIM + first, mask=inside, other=0))
    b = widen(tl.load(x + row[:, None] * DIM + second, mask=inside, other=0))
    angle = ((row // heads) % tokens)[:, None] * PAIRS + k
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    if UNDO:
        u = a * c + b * s
        v = b * c - a * s
    else:
        u = a * c - b * s
        v = b * c + a * s
    # what does not turn keeps its bits, a sign of zero too
    u = tl.where(turns, u, a)
    v = tl.where(turns, v, b)
    if UNDO:
        tl.store(out + row[:, None] * DIM + first, u, mask=inside)
        tl.store(out + row[:, None] * DIM + second, v, mask=inside)
    else:
        kind = out.dtype.element_ty
        tl.store(out + row[:, None] * DIM + first, narrow(u, kind), mask=inside)
        tl.store(out + row[:, None] * DIM + second, narrow(v, kind), mask=inside)


def unrotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Turn keys back by the angles of their tokens.

    Args:
        x: ``[layers, tokens, heads, dim]`` bfloat16, float16 or float32, contiguous, finite; dim even.
        cos: ``[tokens, pairs]`` float32 of `tables`, contiguous, with at least one pair and ``2 * pairs <= dim``.
        sin: The same.
        interleaved: Pairs are neighbours; else the members of a pair are ``pairs`` apart.

    Returns:
        The same shape, float32.
    """
    return _turn(x, cos, sin, interleaved, True, torch.float32)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Undo `unrotate`, to bfloat16, float16 or float32, held at the largest finite number."""
    return _turn(x, cos, sin, interleaved, False, dtype)


def _turn(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    undo: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    layers, tokens, heads, dim = x.shape
    if dim % 2:
        raise ValueError(f"heads of {dim} values are not supported")
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    half = triton.next_power_of_2(dim // 2)
    several = max(1, _PAIRS // half)
    rows = layers * tokens * heads
    rotate_kernel[(triton.cdiv(rows, several),)](
        as_bits(x),
        cos,
        sin,
        as_bits(out),
        rows,
        tokens,
        heads,
        DIM=dim,
        PAIRS=cos.shape[1],
        HALF=half,
        INTERLEAVED=interleaved,
        UNDO=undo,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out
