"""Choice of each channel's table on a GPU, as `ladder_ref` defines it; `rans_triton` codes with what was chosen.

One kernel counts magnitudes and prices all tables, a channel a warp. What it leaves of the prices is which tables a
channel could keep from the one after it, in 128 bits; with these a second kernel, of one warp, goes through the
channels from the last to the first.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from kvserve_kernels.ladder.bins import LEAST, shift_of
from kvserve_kernels.ladder.tables import KEEP, prices

_TABLES = tl.constexpr(128)
_BINS = tl.constexpr(len(LEAST))
# bins from here on begin at multiples of it
_FINE = tl.constexpr(128)
# magnitudes that a thread adds up in fields of 4 bits, and how often these go into fields of 8
_FEW = tl.constexpr(8)
_OFTEN = tl.constexpr(16)


@triton.jit
def price_kernel(values, ones, table_prices, best, keeps, tokens, tables, shift, keep):  # type: ignore[no-untyped-def]
    """Find the cheapest table of one channel, 0 if it is all zero, and which ones cost at most `keep` more."""
    channel = tl.program_id(0).to(tl.int64)
    row = values + channel * tokens
    place = tl.arange(0, 32)[:, None] * _FEW + tl.arange(0, _FEW)[None, :]
    counts = (0,) * _BINS
    for first in range(0, tokens, 32 * _FEW * _OFTEN):
        even = tl.zeros([32], tl.uint64)
        odd = tl.zeros([32], tl.uint64)
        for start in range(first, min(first + 32 * _FEW * _OFTEN, tokens), 32 * _FEW):
            t = start + place
            magnitude = tl.abs(tl.load(row + t, mask=t < tokens, other=0).to(tl.int32))
            index = tl.where(magnitude < _FINE, magnitude, _FINE + magnitude // _FINE)
            few = tl.sum(tl.load(ones + index).to(tl.uint64, bitcast=True), 1)
            even += few & 0x0F0F0F0F0F0F0F0F
            odd += (few >> 4) & 0x0F0F0F0F0F0F0F0F
        more = (0,)
        for b in tl.static_range(1, _BINS):
            field = (odd if b % 2 == 0 else even) >> (b - 1) // 2 * 8
            # Triton knows no tuple with a star
            more = more + (counts[b] + tl.sum((field & 0xFF).to(tl.int32), 0),)  # type: ignore[assignment]  # noqa: RUF005
        counts = more
    table = tl.arange(0, _TABLES)
    cost = tl.zeros([_TABLES], tl.int32)
    left = tokens
    for b in tl.static_range(1, _BINS):
        left -= counts[b]
        # rounded up, so that what occurs at all counts
        rounded = (counts[b] + (1 << shift) - 1) >> shift
        cost += rounded * tl.load(table_prices + b * _TABLES + table)
    cost += ((left + (1 << shift) - 1) >> shift) * tl.load(table_prices + table)
    some = (table > 0) & (table < tables)
    cost = tl.where(some, cost, 0x7FFFFFFF)
    least = tl.min(cost, 0)
    live = left < tokens
    cheapest = tl.min(tl.where(cost == least, table, _TABLES), 0)
    tl.store(best + channel, tl.where(live, cheapest, 0).to(tl.uint8))
    kept = (live & some & (cost <= least + keep)).to(tl.uint32)
    bits = tl.reshape(kept << (table % 32).to(tl.uint32), [4, 32])
    words = tl.sum(bits, 1).to(tl.int32, bitcast=True)
    tl.store(keeps + channel * 4 + tl.arange(0, 4), words)


@triton.jit
def chain_kernel(best, keeps, ids, channels):  # type: ignore[no-untyped-def]
    """Let each channel keep the table of the one after it where it may, from the last to the first."""
    lane = tl.arange(0, 32)
    after = 0
    for block in range(tl.cdiv(channels, 32)):
        channel = channels - 1 - block * 32 - lane
        known = channel >= 0
        own = tl.load(best + channel, mask=known, other=0).to(tl.int32)
        first = tl.load(keeps + channel * 4, mask=known, other=0)
        second = tl.load(keeps + channel * 4 + 1, mask=known, other=0)
        third = tl.load(keeps + channel * 4 + 2, mask=known, other=0)
        fourth = tl.load(keeps + channel * 4 + 3, mask=known, other=0)
        chosen = tl.zeros([32], tl.int32)
        for i in tl.static_range(32):
            low = tl.where(after < 32, first, second)
            high = tl.where(after < 96, third, fourth)
            word = tl.where(after < 64, low, high)
            keep = ((word >> (after % 32)) & 1) != 0
            after = tl.sum(tl.where(lane == i, tl.where(keep, after, own), 0), 0)
            chosen = tl.where(lane == i, after, chosen)
        tl.store(ids + channel, chosen.to(tl.uint8), mask=known)


def choose(values: torch.Tensor) -> torch.Tensor:
    """Return the table of each channel.

    Args:
        values: ``[channels, tokens]`` int16, contiguous.

    Returns:
        ``[channels]`` uint8.
    """
    channels, tokens = values.shape
    shift = shift_of(tokens)
    best = torch.empty(channels, dtype=torch.uint8, device=values.device)
    keeps = torch.empty((channels, 4), dtype=torch.int32, device=values.device)
    ids = torch.empty_like(best)
    price_kernel[(channels,)](
        values,
        *_tables_on(values.device),
        best,
        keeps,
        tokens,
        len(prices()),
        shift,
        KEEP >> shift,
        num_warps=1,
    )
    chain_kernel[(1,)](best, keeps, ids, channels, num_warps=1)
    return ids


@cache
def _tables_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a one in the field of each magnitude's bin, int64, none for zero; and the prices ``[bins, 128]`` int32."""
    starts = np.arange(_FINE.value + 2**15 // _FINE.value + 1)
    starts[_FINE.value :] = (starts[_FINE.value :] - _FINE.value) * _FINE.value
    bins = np.searchsorted(LEAST, starts, side="right") - 1
    ones = np.where(bins > 0, np.uint64(1) << (np.maximum(bins, 1) - 1).astype(np.uint64) * 4, 0)
    padded = np.zeros((len(LEAST), _TABLES.value), np.int32)
    padded[:, : len(prices())] = prices().T
    return torch.from_numpy(ones.view(np.int64)).to(device), torch.from_numpy(padded).to(device)
