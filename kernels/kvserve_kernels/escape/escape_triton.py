"""Escape coding of bytes on a GPU: four-bit codes of the sixteen most frequent, positions and values of the others.

The bytes are those of `escape_ref`. Blocks count their escapes first; a sum over blocks tells each where to write.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvserve_kernels.escape.escape_cpu import CHUNK, CODES

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class DeviceEscaped:
    """`escape_cpu.Escaped` on a device: unsigned 16- and 32-bit integers travel as signed ones of the same bits.

    Attributes:
        book: ``[16]`` uint8, rising.
        codes: ``[ceil(count / 2)]`` uint8.
        counts: ``[ceil(count / 65536)]`` int32.
        positions: ``[escapes]`` int16.
        values: ``[escapes]`` uint8.
    """

    book: torch.Tensor
    codes: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor


@triton.jit
def histogram_kernel(data, frequencies, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the frequencies of the bytes of a block."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    byte = tl.load(data + place, mask=inside, other=0).to(tl.int32)
    tl.atomic_add(
        frequencies + tl.arange(0, 256), tl.histogram(byte, 256, mask=inside), sem="relaxed"
    )


@triton.jit
def codes_kernel(data, code_of, codes, escaped, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the codes of a block of bytes, two a byte, and how many have none."""
    pair = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    place = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    inside = place < count
    byte = tl.load(data + place, mask=inside, other=0).to(tl.int32)
    code = tl.load(code_of + byte, mask=inside, other=0).to(tl.int32)
    nibbles = tl.sum((code & 15) << (tl.arange(0, 2) * 4)[None, :], 1)
    tl.store(codes + pair, nibbles.to(tl.uint8), mask=pair * 2 < count)
    tl.store(escaped + tl.program_id(0), tl.sum(tl.sum(code >> 7, 1), 0))


@triton.jit
def escapes_kernel(  # type: ignore[no-untyped-def]
    data, code_of, offsets, positions, values, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """List the bytes of a block that have no code."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    at = tl.load(offsets + tl.program_id(0))
    # most blocks of real data have escapes, but few: the bytes are read again, the list is short
    if tl.load(offsets + tl.program_id(0) + 1) > at:
        byte = tl.load(data + place, mask=inside, other=0)
        code = tl.load(code_of + byte.to(tl.int32), mask=inside, other=0).to(tl.int32)
        missing = code >> 7
        index = at + tl.cumsum(missing, 0) - 1
        tl.store(positions + index, (place % CHUNK).to(tl.int16), mask=missing == 1)
        tl.store(values + index, byte, mask=missing == 1)


@triton.jit
def bytes_kernel(codes, book, data, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write what the codes of a block mean."""
    pair = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    place = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    nibbles = tl.load(codes + pair, mask=pair * 2 < count, other=0).to(tl.int32)
    code = (nibbles[:, None] >> (tl.arange(0, 2) * 4)[None, :]) & 15
    tl.store(data + place, tl.load(book + code), mask=place < count)


@triton.jit
def patch_kernel(  # type: ignore[no-untyped-def]
    positions, values, offsets, data, failed, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the escapes of one chunk in place, and say if positions do not rise or lie outside."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + chunk)
    end = tl.load(offsets + chunk + 1)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        known = index < end
        position = tl.load(positions + index, mask=known, other=0).to(tl.int32) & 0xFFFF
        before = tl.load(positions + index - 1, mask=known & (index > begin), other=0)
        before = tl.where(index > begin, before.to(tl.int32) & 0xFFFF, -1)
        place = chunk * CHUNK + position
        bad = known & ((position <= before) | (place >= count))
        value = tl.load(values + index, mask=known, other=0)
        tl.store(data + place, value, mask=known & (place < count))
        tl.store(failed + index * 0, tl.full([BLOCK], 1, tl.int32), mask=bad)


def encode(data: torch.Tensor) -> DeviceEscaped:
    """Code ``[count]`` uint8, contiguous; at most 2^31 escapes."""
    count = data.numel()
    blocks = triton.cdiv(count, _BLOCK)
    device = data.device
    frequencies = torch.zeros(256, dtype=torch.int32, device=device)
    if count:
        histogram_kernel[(blocks,)](data, frequencies, count, BLOCK=_BLOCK)
    book = torch.argsort(-frequencies, stable=True)[:CODES].sort().values
    code_of = torch.full((256,), 128, dtype=torch.uint8, device=device)
    code_of[book] = torch.arange(CODES, dtype=torch.uint8, device=device)
    codes = torch.empty(triton.cdiv(count, 2), dtype=torch.uint8, device=device)
    escaped = torch.zeros(blocks, dtype=torch.int32, device=device)
    if count:
        codes_kernel[(blocks,)](data, code_of, codes, escaped, count, BLOCK=_BLOCK, num_warps=8)
    offsets = torch.nn.functional.pad(escaped.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(offsets[-1])
    positions = torch.empty(total, dtype=torch.int16, device=device)
    values = torch.empty(total, dtype=torch.uint8, device=device)
    if total:
        escapes_kernel[(blocks,)](
            data, code_of, offsets, positions, values, count, CHUNK=CHUNK, BLOCK=_BLOCK, num_warps=8
        )
    chunks = triton.cdiv(count, CHUNK)
    several = CHUNK // _BLOCK
    padded = torch.nn.functional.pad(escaped, (0, chunks * several - blocks))
    counts = padded.view(chunks, several).sum(1, dtype=torch.int32)
    return DeviceEscaped(book.to(torch.uint8), codes, counts, positions, values)


def decode(coded: DeviceEscaped, count: int) -> torch.Tensor | None:
    """Undo `encode`; None if positions do not rise or lie outside.

    Args:
        coded: ``counts`` must sum to the number of positions and values.
        count: Bytes to return.
    """
    data = torch.empty(count, dtype=torch.uint8, device=coded.codes.device)
    if not count:
        return data
    bytes_kernel[(triton.cdiv(count, _BLOCK),)](
        coded.codes, coded.book, data, count, BLOCK=_BLOCK, num_warps=8
    )
    offsets = torch.nn.functional.pad(coded.counts.cumsum(0, dtype=torch.int32), (1, 0))
    failed = torch.zeros(1, dtype=torch.int32, device=data.device)
    patch_kernel[(coded.counts.numel(),)](
        coded.positions,
        coded.values,
        offsets,
        data,
        failed,
        count,
        CHUNK=CHUNK,
        BLOCK=1024,
        num_warps=8,
    )
    return None if failed else data
