"""The linear transform on a GPU: the levels of `linear_ref` bit by bit, and its values to within rounding.

Encoding takes two kernels: `prepare_kernel` turns keys back, centres and rounds to int8, one token a program;
`quantise_kernel` multiplies integers on tensor cores and rounds to levels. Decoding takes two as well:
`dequantise_kernel` makes bfloat16 of levels once, and `expand_kernel` multiplies, adds means, turns keys and writes
cache values. It keeps the two members of a rotary pair in two accumulators, so that a pair never leaves its thread.
"""

from dataclasses import dataclass

import torch
import triton

from kvserve_kernels.bits_triton import as_bits
from kvserve_kernels.linear.kernels_triton import (
    dequantise_kernel,
    expand_kernel,
    prepare_kernel,
    quantise_kernel,
)
from kvserve_kernels.linear.plan import MAX_SHIFT, Group, Plan

_COMPONENTS = 128
_TOKENS = 128
_WIDTH = 128
_PAIRS = 512
# a token of up to so many pairs stays in registers between finding its peak and rounding
_MOST_PAIRS = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceGroup:
    """A `plan.Group` on a device.

    ``matrix``, ``factor``, ``offset``, ``delta`` and ``inverse`` are padded with zeros to a multiple of 128 components,
    ``matrix`` to one of 128 columns, too. ``inverse`` is bfloat16, or float32 of the same values where there are no
    bfloat16 products: in the interpreter.
    """

    components: int
    rows: torch.Tensor
    heads: torch.Tensor
    rotations: torch.Tensor
    mean: torch.Tensor
    inv_scale: torch.Tensor
    matrix: torch.Tensor
    factor: torch.Tensor
    offset: torch.Tensor
    delta: torch.Tensor
    inverse: torch.Tensor


def put_group(
    group: Group, device: torch.device | str, operand: torch.dtype = torch.bfloat16
) -> DeviceGroup:
    """Return the group on a device; see `DeviceGroup` for ``operand``."""
    more = -group.components % _COMPONENTS
    wider = -group.width % _WIDTH

    def put(name: str) -> torch.Tensor:
        return torch.from_numpy(getattr(group, name)).to(device)

    def longer(name: str) -> torch.Tensor:
        return torch.nn.functional.pad(put(name), (0, more))

    inverse = put("inverse_bits").view(torch.bfloat16)
    # here the unit goes into the matrix, which is rounded once more unless it is a power of two
    inverse = (inverse.float() * group.unit).to(torch.bfloat16).to(operand)
    return DeviceGroup(
        components=group.components,
        **{name: put(name) for name in ("rows", "heads", "rotations", "mean", "inv_scale")},
        **{name: longer(name) for name in ("factor", "offset", "delta")},
        matrix=torch.nn.functional.pad(put("matrix"), (0, wider, 0, more)),
        inverse=torch.nn.functional.pad(inverse, (0, 0, 0, more)),
    )


def put_plan(
    plan: Plan, device: torch.device | str, operand: torch.dtype = torch.bfloat16
) -> tuple[DeviceGroup, ...]:
    """Return the groups of a plan on a device; keep them."""
    return tuple(put_group(group, device, operand) for group in plan.groups)


def forward(
    native: torch.Tensor,
    groups: tuple[DeviceGroup, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor | None:
    """Map the values of a piece to levels.

    Args:
        native: ``[rows, tokens, heads, dim]`` bfloat16, float16 or float32, finite; dim even and contiguous.
        groups: From `put_plan`, of a plan that fits the piece.
        cos: ``[rotations, tokens, pairs]`` float32 of `rotate.tables`, to undo; contiguous.
        sin: The same.
        interleaved: How pairs lie.

    Returns:
        ``[components, tokens]`` int16; None where `linear_ref.prepare` has none.
    """
    tokens, dim = native.shape[1], native.shape[3]
    _check(native)
    components = [group.components for group in groups]
    levels = torch.empty((sum(components), tokens), dtype=torch.int16, device=native.device)
    too_large = torch.zeros((), dtype=torch.bool, device=native.device)
    padded = triton.cdiv(tokens, _TOKENS) * _TOKENS
    half = triton.next_power_of_2(dim // 2)
    for group, to in zip(groups, levels.split(components), strict=True):
        count, width = group.rows.numel(), group.matrix.shape[1]
        # padding is not written: its columns meet zeros, its rows make levels that are not stored
        x8 = torch.empty((padded, width), dtype=torch.int8, device=native.device)
        shifts = torch.empty(tokens, dtype=torch.int8, device=native.device)
        slots = triton.next_power_of_2(count)
        whole = slots * half <= _MOST_PAIRS
        slots = slots if whole else max(1, _PAIRS // half)
        prepare_kernel[(tokens,)](
            as_bits(native),
            group.rows,
            group.heads,
            group.rotations,
            group.mean,
            group.inv_scale,
            cos,
            sin,
            x8,
            shifts,
            tokens,
            *native.stride()[:3],
            count,
            width,
            DIM=dim,
            PAIRS=cos.shape[2],
            HALF=half,
            INTERLEAVED=interleaved,
            SLOTS=slots,
            WHOLE=whole,
            num_warps=min(16, max(4, slots * half // 512)),
            enable_fp_fusion=False,
        )
        too_large |= (shifts > MAX_SHIFT).any()
        if to.numel() == 0:
            continue
        grid = (triton.cdiv(to.shape[0], _COMPONENTS), padded // _TOKENS)
        quantise_kernel[grid](
            group.matrix,
            x8,
            shifts,
            group.factor,
            group.offset,
            to,
            to.shape[0],
            tokens,
            width,
            BLOCK_C=_COMPONENTS,
            BLOCK_T=_TOKENS,
            BLOCK_W=_WIDTH,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=False,
        )
    return None if too_large else levels


def inverse(
    levels: torch.Tensor,
    groups: tuple[DeviceGroup, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    out: torch.Tensor,
) -> None:
    """Write what levels stand for into a piece.

    Sums run over bfloat16 products in float32, in an order of the compiler's: a value differs from the exact sum by at
    most ``components * 2**-23`` of the sum of magnitudes, and a bfloat16 result by half a unit more.

    Args:
        levels: ``[components, tokens]`` int16, contiguous.
        groups: From `put_plan`, of a plan that fits the piece.
        cos: ``[rotations, tokens, pairs]`` float32 of `rotate.tables`, to rotate; contiguous.
        sin: The same.
        interleaved: How pairs lie.
        out: ``[rows, tokens, heads, dim]`` bfloat16, float16 or float32; dim even and contiguous; cells of no group are
            left.
    """
    tokens, dim = out.shape[1], out.shape[3]
    _check(out)
    components = [group.components for group in groups]
    padded = triton.cdiv(tokens, _TOKENS) * _TOKENS
    half = triton.next_power_of_2(dim // 2)
    for group, part in zip(groups, levels.split(components), strict=True):
        whole = group.inverse.shape[0]
        restored = torch.empty((whole, padded), dtype=group.inverse.dtype, device=levels.device)
        if whole:
            dequantise_kernel[(whole, triton.cdiv(padded, 1024))](
                part,
                group.delta,
                restored,
                part.shape[0],
                tokens,
                padded,
                BLOCK=1024,
                num_warps=4,
            )
        count = group.rows.numel()
        several = max(1, min(64 // half, triton.next_power_of_2(count + 1) // 2))
        expand_kernel[(triton.cdiv(count, several), padded // _TOKENS)](
            restored,
            group.inverse,
            group.rows,
            group.heads,
            group.rotations,
            group.mean,
            cos,
            sin,
            as_bits(out),
            whole,
            tokens,
            *out.stride()[:3],
            count,
            padded,
            DIM=dim,
            PAIRS=cos.shape[2],
            HALF=half,
            INTERLEAVED=interleaved,
            SLOTS=several,
            BLOCK_T=_TOKENS,
            BLOCK_C=64,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=False,
        )


def _check(piece: torch.Tensor) -> None:
    """Refuse what the kernels can't address."""
    if piece.shape[3] % 2 or piece.stride(3) != 1:
        raise ValueError(
            f"heads of {piece.shape[3]} values, {piece.stride(3)} apart, are not supported"
        )
