"""Raw low bits and escapes on a GPU: what goes beside the streams of `rans_triton`.

Only channels whose table has low bits, or an escape, are read. The order of what is written is that of `symbols_cpu`.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.rans.rans_cpu import LANES
from kvserve_kernels.rans.tables_triton import Tables

_GROUPS = 8
_BLOCK = 1024


@triton.jit
def planes_kernel(values, planes, channel_facts, tokens, groups, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the low bits of `GROUPS` groups of 32 tokens of one channel, one bit of a group a word."""
    channel = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, 32)
    base = tl.load(channel_facts + channel * 4)
    low_bits = tl.load(channel_facts + channel * 4 + 1)
    plane_at = tl.load(channel_facts + channel * 4 + 2)
    if low_bits > 0:
        place = group[:, None] * 32 + lane[None, :]
        inside = place < tokens
        value = tl.load(values + channel.to(tl.int64) * tokens + place, mask=inside, other=0)
        low = tl.where(inside, value.to(tl.int32) - base, 0)
        for b in range(low_bits):
            word = tl.sum(((low >> b) & 1) << lane[None, :], 1)
            tl.store(planes + plane_at + group * low_bits + b, word, mask=group < groups)


@triton.jit
def is_outside(value, base, span, DECODED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return whether values are, or were decoded as, escapes."""
    above = value.to(tl.int32) - base
    # a decoded escape lies above the span, but may have wrapped round in int16
    return ((above & 0xFFFF) >= span) if DECODED else ((above < 0) | (above >= span))


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    values, counts, channel_facts, tokens, DECODED: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the values of one channel that are outside its table's span, if it has an escape."""
    channel = tl.program_id(0)
    base = tl.load(channel_facts + channel * 4)
    span = tl.load(channel_facts + channel * 4 + 2)
    row = values + channel.to(tl.int64) * tokens
    total = 0
    if tl.load(channel_facts + channel * 4 + 3) != 0:
        for start in range(0, tokens, BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(row + place, mask=place < tokens, other=0)
            outside = (place < tokens) & is_outside(value, base, span, DECODED)
            total += tl.sum(outside.to(tl.int32), 0)
    tl.store(counts + channel, total)


@triton.jit
def escapes_kernel(  # type: ignore[no-untyped-def]
    values, escapes, offsets, channel_facts, tokens, count, PUT: tl.constexpr, BLOCK: tl.constexpr
):
    """Move the escaped values of one channel: into ``values`` if `PUT`, else out of them."""
    channel = tl.program_id(0)
    base = tl.load(channel_facts + channel * 4)
    span = tl.load(channel_facts + channel * 4 + 2)
    row = values + channel.to(tl.int64) * tokens
    at = tl.load(offsets + channel)
    if tl.load(offsets + channel + 1) > at:
        for start in range(0, tokens, BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(row + place, mask=place < tokens, other=0)
            outside = (place < tokens) & is_outside(value, base, span, PUT)
            ones = outside.to(tl.int32)
            index = at + tl.cumsum(ones, 0) - 1
            if PUT:
                outside = outside & (index < count)
                tl.store(row + place, tl.load(escapes + index, mask=outside, other=0), mask=outside)
            else:
                tl.store(escapes + index, value, mask=outside)
            at += tl.sum(ones, 0)


def low_planes(values: torch.Tensor, tables: Tables, table_of: torch.Tensor) -> torch.Tensor:
    """Return the raw low bits.

    Args:
        values: ``[channels, tokens]`` int16, contiguous.
        tables: From `tables_triton.put_tables`.
        table_of: ``[channels]`` integers, the table of each channel.

    Returns:
        ``[low bits of all channels * groups of 32 tokens]`` int32, by channel, group and bit.
    """
    channels, tokens = values.shape
    groups = triton.cdiv(tokens, LANES)
    facts = tables.facts[table_of.long()].contiguous()
    low_bits = facts[:, 1]
    facts[:, 2] = (low_bits.cumsum(0) - low_bits) * groups
    planes = torch.empty(int(low_bits.sum()) * groups, dtype=torch.int32, device=values.device)
    if planes.numel():
        grid = (channels, triton.cdiv(groups, _GROUPS))
        planes_kernel[grid](values, planes, facts, tokens, groups, GROUPS=_GROUPS, num_warps=4)
    return planes


def take_escapes(values: torch.Tensor, tables: Tables, table_of: torch.Tensor) -> torch.Tensor:
    """Return the values that need an escape, ``[count]`` int16, by channel and token."""
    if not tables.escapes:
        return torch.empty(0, dtype=torch.int16, device=values.device)
    facts = tables.facts[table_of.long()].contiguous()
    offsets = _escape_offsets(values, facts, decoded=False)
    count = int(offsets[-1])
    escapes = torch.empty(count, dtype=torch.int16, device=values.device)
    escapes_kernel[(values.shape[0],)](
        values, escapes, offsets, facts, values.shape[1], count, PUT=False, BLOCK=_BLOCK
    )
    return escapes


def put_escapes(
    values: torch.Tensor, tables: Tables, table_of: torch.Tensor, escapes: torch.Tensor
) -> bool:
    """Write escaped values where `rans_triton.decode` left their symbol.

    Args:
        values: ``[channels, tokens]`` int16, from `rans_triton.decode`; changed.
        tables: From `tables_triton.put_tables`.
        table_of: ``[channels]`` integers, the table of each channel.
        escapes: ``[count]`` int16, by channel and token.

    Returns:
        Whether there were as many as symbols that stand for one.
    """
    if not tables.escapes:
        return escapes.numel() == 0
    facts = tables.facts[table_of.long()].contiguous()
    offsets = _escape_offsets(values, facts, decoded=True)
    count = escapes.numel()
    escapes_kernel[(values.shape[0],)](
        values, escapes, offsets, facts, values.shape[1], count, PUT=True, BLOCK=_BLOCK
    )
    return int(offsets[-1]) == count


def _escape_offsets(values: torch.Tensor, facts: torch.Tensor, *, decoded: bool) -> torch.Tensor:
    """Return where the escapes of each channel begin and the last ends, ``[channels + 1]`` int32."""
    channels, tokens = values.shape
    counts = torch.empty(channels, dtype=torch.int32, device=values.device)
    count_kernel[(channels,)](values, counts, facts, tokens, DECODED=decoded, BLOCK=_BLOCK)
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
