"""Interleaved rANS on a GPU: a warp decodes or encodes streams of 32 lanes, straight to and from int16 values.

The streams are those of `rans_cpu`, bit by bit. One program is one warp and holds a few of them, so that what is the
same for a whole channel (its table, base and low bits) is fetched once for all. Triton has no ballot and no count of
bits: a sum over lanes of distinct powers of two becomes one REDUX, the usual bit trick one POPC.

Bits travel as signed integers, because torch computes little on unsigned ones: words int16, states and planes int32.
"""

import torch
import triton
import triton.language as tl

from kvserve_kernels.rans.rans_cpu import LANES, MAX_SYMBOLS, TOTAL
from kvserve_kernels.rans.tables_triton import Tables

_COPY_BLOCK = 4096
# kept from the compiler: it would give a thread several tokens of a stream, but lanes must be threads
_LANED = ["values", "words", "states"]
_NUMBERS = ["channels", "tokens", "streams", "last_row"]


@triton.jit
def bit_count(x):  # type: ignore[no-untyped-def]
    """Return the number of ones in each uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_LANED)
def decode_kernel(  # type: ignore[no-untyped-def]
    values,
    words,
    offsets,
    states,
    slots,
    channel_facts,
    planes,
    sound,
    channels,
    tokens,
    streams,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Decode `STREAMS` streams of `GROUPS` groups of 32 tokens a channel, and say whether they end as they must."""
    stream = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    lane = tl.arange(0, 32)
    first = stream * (GROUPS * 32)
    place = first[:, None] + lane[None, :]
    live = (stream[:, None] < streams) & (place < tokens)
    bit = (1 << lane.to(tl.uint32)).to(tl.uint32)[None, :]
    below = bit - 1
    x = tl.load(states + stream[:, None] * 32 + lane[None, :], mask=live, other=65536)
    x = x.to(tl.uint32, bitcast=True)
    at = tl.load(offsets + stream, mask=stream < streams, other=0)
    # one behind the last word: where a stream stays that ran over its end, so that reads stay inside the padding
    limit = tl.load(offsets + stream + 1, mask=stream < streams, other=0) + 1
    # streams lie side by side, so that one address serves all
    row = values + (tl.program_id(0) * (STREAMS * GROUPS * 32) + lane)[None, :]
    beside = (tl.arange(0, STREAMS) * (GROUPS * 32))[:, None]
    facts = channel_facts
    table = tl.load(facts)
    for _ in range(channels):
        first_slot = table
        row += tl.load(facts + 3)
        scale = tl.load(facts + 1)
        base = scale
        low_bits = 0
        if PLANES:
            base = scale >> 4
            low_bits = scale & 15
            plane_at = tl.load(facts + 2)
        # the next channel's, so that nothing waits for it
        table = tl.load(facts + 4)
        for g in tl.static_range(GROUPS):
            inside = live
            if GROUPS > 1:
                inside = live & (place + g * 32 < tokens)
            # a table begins at a multiple of its size; an index of 32 bits costs one instruction less than an address
            slot = (x & 4095).to(tl.int32) | first_slot
            entry = tl.load(slots + slot).to(tl.uint32, bitcast=True)
            high = x >> 12
            y = (entry & 0xFFF) * high + (high + (entry >> 20))
            due = inside & (y < 65536)
            ballot = tl.sum(tl.where(due, bit, 0).to(tl.uint32), 1).to(tl.uint32)
            rank = bit_count(ballot[:, None] & below).to(tl.int32)
            word = tl.load(words + (at[:, None] + rank))
            y = tl.where(due, (y << 16) | word.to(tl.uint16, bitcast=True).to(tl.uint32), y)
            at = tl.minimum(at + bit_count(ballot).to(tl.int32), limit)
            x = y if GROUPS == 1 else tl.where(inside, y, x)
            symbol = ((entry & 0xFF000) >> 12).to(tl.int32)
            value = base + (symbol << low_bits if PLANES else symbol)
            if PLANES:
                for b in range(low_bits):
                    plane = plane_at + b + (stream * GROUPS + g) * low_bits
                    raw = tl.load(planes + plane, mask=first + g * 32 < tokens, other=0)
                    value += ((raw[:, None] >> lane[None, :]) & 1) << b
            tl.store(row + (beside + g * 32), value.to(tl.int16), mask=inside)
        facts += 4
    wrong = tl.max(tl.where(live & (x != 65536), 1, 0), 1)
    tl.store(sound + stream, ((wrong == 0) & (at == limit - 1)).to(tl.int8), mask=stream < streams)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_LANED)
def encode_kernel(  # type: ignore[no-untyped-def]
    values,
    words,
    counts,
    states,
    divisors,
    channel_facts,
    last_row,
    channels,
    tokens,
    streams,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """Code `STREAMS` streams of `GROUPS` groups of 32 tokens a channel, backwards from the end of each one's buffer."""
    stream = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    lane = tl.arange(0, 32)
    place = (stream * (GROUPS * 32))[:, None] + lane[None, :]
    live = (stream[:, None] < streams) & (place < tokens)
    bit = (1 << lane.to(tl.uint32)).to(tl.uint32)[None, :]
    below = bit - 1
    x = tl.full([STREAMS, 32], 65536, tl.uint32)
    capacity = channels * (GROUPS * 32)
    window = (words + stream.to(tl.int64) * capacity)[:, None]
    at = tl.zeros([STREAMS], tl.int32) + capacity
    row = values + last_row + place
    facts = channel_facts + (channels - 1) * 4
    for _ in range(channels):
        table_row = divisors + tl.load(facts)
        base = tl.load(facts + 1)
        scale = tl.load(facts + 2).to(tl.uint32, bitcast=True)
        span = scale >> 4
        low_bits = scale & 15
        for h in tl.static_range(GROUPS):
            g = GROUPS - 1 - h
            inside = live
            if GROUPS > 1:
                inside = live & (place + g * 32 < tokens)
            value = tl.load(row + g * 32, mask=inside, other=0).to(tl.int32)
            # what is below the base wraps round to above the span
            symbol = tl.minimum((value - base).to(tl.uint32, bitcast=True), span) >> low_bits
            entry = tl.load(table_row + symbol, mask=inside, other=0).to(tl.uint64, bitcast=True)
            rest = (entry & 0xFFFFFFFF).to(tl.uint32)
            reciprocal = (entry >> 32).to(tl.uint32)
            complement = rest & 0xFFF
            due = inside & ((x >> 20) + complement >= 4096)
            ballot = tl.sum(tl.where(due, bit, 0).to(tl.uint32), 1).to(tl.uint32)
            at -= bit_count(ballot).to(tl.int32)
            rank = bit_count(ballot[:, None] & below).to(tl.int32)
            tl.store(window + (at[:, None] + rank), x.to(tl.int16), mask=due)
            y = tl.where(due, x >> 16, x)
            quotient = tl.umulhi(y + ((rest >> 24) & 1), reciprocal) >> (rest >> 28)
            y += quotient * complement + ((rest >> 12) & 0xFFF)
            x = y if GROUPS == 1 else tl.where(inside, y, x)
        row -= tl.load(facts + 3)
        facts -= 4
    tl.store(states + stream[:, None] * 32 + lane[None, :], x.to(tl.int32, bitcast=True), mask=live)
    tl.store(counts + stream, capacity - at, mask=stream < streams)


@triton.jit
def gather_kernel(words, offsets, out, capacity, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Move the words of each stream from the end of its buffer to their place in one array."""
    stream = tl.program_id(0)
    begin = tl.load(offsets + stream)
    count = tl.load(offsets + stream + 1) - begin
    source = words + (stream.to(tl.int64) + 1) * capacity - count
    # blocks start where the target is aligned to a block, so that writes are as wide as they can be
    index = tl.program_id(1) * BLOCK - begin % BLOCK + tl.arange(0, BLOCK)
    inside = (index >= 0) & (index < count)
    tl.store(out + begin + index, tl.load(source + index, mask=inside, other=0), mask=inside)


def _streams_per_warp(streams: int) -> int:
    """Return 1, 2 or 4: as long as there are few streams, more warps hide more latency."""
    return 1 if streams < 2048 else 2 if streams < 8192 else 4


def _rows(live: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return how far each live channel's row lies from the one before, in elements; int32."""
    if values.numel() >= 1 << 31:
        raise ValueError(f"{values.numel()} values are too many for one call")
    return (live * values.shape[1]).diff(prepend=live.new_zeros(1)).int()


def encode(
    values: torch.Tensor, tables: Tables, table_of: torch.Tensor, *, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code values in streams of ``32 * groups`` tokens of all channels.

    Args:
        values: ``[channels, tokens]`` int16, contiguous; what is outside a table's span needs its escape.
        tables: From `tables_triton.put_tables`.
        table_of: ``[channels]`` integers, the table of each channel.
        groups: Groups of 32 tokens a stream.

    Returns:
        The words of all streams one after the other, int16; where each stream's begin and the last ends, ``[streams +
        1]`` int32; and the states ``[streams, 32]`` int32, of which a last stream of fewer tokens fills only as many.
    """
    tokens = values.shape[1]
    streams = triton.cdiv(tokens, LANES * groups)
    index = table_of.long()
    live = tables.coded[index].nonzero().squeeze(1)
    channels = live.numel()
    capacity = channels * LANES * groups
    base, low_bits, span, _ = tables.facts[index[live]].unbind(1)
    table = index[live].int() * MAX_SYMBOLS
    rows = _rows(live, values)
    facts = torch.stack([table, base, span << 4 | low_bits, rows], 1).contiguous()
    buffer = torch.empty(streams * capacity, dtype=torch.int16, device=values.device)
    counts = torch.empty(streams, dtype=torch.int32, device=values.device)
    states = torch.full((streams, LANES), 1 << 16, dtype=torch.int32, device=values.device)
    several = _streams_per_warp(streams)
    encode_kernel[(triton.cdiv(streams, several),)](
        values,
        buffer,
        counts,
        states,
        tables.divisors,
        facts,
        int(live[-1]) * tokens if channels else 0,
        channels,
        tokens,
        streams,
        GROUPS=groups,
        STREAMS=several,
        num_warps=1,
    )
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    words = torch.empty(int(offsets[-1]), dtype=torch.int16, device=values.device)
    # one block more than the largest count needs, because blocks are aligned to the target
    blocks = triton.cdiv(int(counts.max()), _COPY_BLOCK) + 1
    gather_kernel[(streams, blocks)](buffer, offsets, words, capacity, BLOCK=_COPY_BLOCK)
    return words, offsets, states


def decode(
    words: torch.Tensor,
    offsets: torch.Tensor,
    states: torch.Tensor,
    tables: Tables,
    table_of: torch.Tensor,
    planes: torch.Tensor,
    *,
    tokens: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `encode` and add the raw low bits; escapes are left to `symbols_triton.put_escapes`.

    Args:
        words: ``[count]`` int16.
        offsets: ``[streams + 1]`` int32, ascending from 0 to ``count``.
        states: ``[streams, 32]`` int32; left as they are.
        tables: From `tables_triton.put_tables`.
        table_of: ``[channels]`` integers, each below the number of tables.
        planes: The raw low bits, int32, in the order of `symbols_cpu.split`.
        tokens: Tokens of all streams.
        groups: Groups of 32 tokens a stream.

    Returns:
        Values ``[channels, tokens]`` int16, and for each stream whether it ended as an encoder leaves it, bool.
    """
    streams = triton.cdiv(tokens, LANES * groups)
    index = table_of.long()
    base, low_bits, _, _ = tables.facts[index].unbind(1)
    all_groups = triton.cdiv(tokens, LANES)
    plane_at = (low_bits.cumsum(0) - low_bits) * all_groups
    if planes.numel() != int(low_bits.sum()) * all_groups:
        raise ValueError("the planes do not fit the tables")
    coded = tables.coded[index]
    live = coded.nonzero().squeeze(1)
    values = torch.empty((index.numel(), tokens), dtype=torch.int16, device=words.device)
    values[~coded] = tables.sole[index[~coded]][:, None]
    scale = base << 4 | low_bits if tables.planes else base
    facts = torch.stack([index.int() * TOTAL, scale, plane_at.int()], 1)[live]
    facts = torch.cat([facts, _rows(live, values)[:, None]], 1)
    # the kernel reads one channel, and one channel's words, ahead
    facts = torch.nn.functional.pad(facts, (0, 0, 0, 1)).contiguous()
    padded = torch.nn.functional.pad(words, (0, LANES * groups + LANES))
    sound = torch.empty(streams, dtype=torch.int8, device=words.device)
    several = _streams_per_warp(streams)
    decode_kernel[(triton.cdiv(streams, several),)](
        values,
        padded,
        offsets,
        states,
        tables.slots,
        facts,
        planes,
        sound,
        live.numel(),
        tokens,
        streams,
        GROUPS=groups,
        STREAMS=several,
        PLANES=tables.planes,
        num_warps=1,
    )
    return values, sound.bool()
