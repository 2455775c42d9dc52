"""Fixed-width packing on a GPU: a thread turns eight codes into ``width`` bytes, or back."""

import torch
import triton
import triton.language as tl

_BLOCK = 512
# whole numbers of bytes that one store or load moves; other widths go byte by byte
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def pack_kernel(codes, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack `BLOCK` groups of eight codes."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 8)
    place = group[:, None] * 8 + i[None, :]
    code = tl.load(codes + place, mask=place < count, other=0).to(tl.uint64)
    # bits of different codes never meet, so that a sum joins them
    word = tl.sum(code << (i * WIDTH).to(tl.uint64)[None, :], 1)
    inside = group * 8 < count
    if out.dtype.element_ty.primitive_bitwidth == 8 * WIDTH:
        tl.store(out + group, word.to(out.dtype.element_ty), mask=inside)
    else:
        for byte in tl.static_range(WIDTH):
            tl.store(out + group * WIDTH + byte, (word >> (8 * byte)).to(tl.uint8), mask=inside)


@triton.jit
def unpack_kernel(data, codes, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack `BLOCK` groups of eight codes."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 8)
    inside = group * 8 < count
    if data.dtype.element_ty.primitive_bitwidth == 8 * WIDTH:
        word = tl.load(data + group, mask=inside, other=0).to(tl.uint64)
    else:
        word = tl.zeros([BLOCK], tl.uint64)
        for byte in tl.static_range(WIDTH):
            part = tl.load(data + group * WIDTH + byte, mask=inside, other=0).to(tl.uint64)
            word = word | (part << (8 * byte))
    place = group[:, None] * 8 + i[None, :]
    code = (word[:, None] >> (i * WIDTH).to(tl.uint64)[None, :]) & ((1 << WIDTH) - 1)
    tl.store(codes + place, code.to(tl.uint8), mask=place < count)


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Pack ``[count]`` uint8 codes below ``2 ** width`` to ``[ceil(count * width / 8)]`` uint8; width 1 to 8."""
    count = codes.numel()
    groups = triton.cdiv(count, 8)
    out = torch.empty(groups * width, dtype=torch.uint8, device=codes.device)
    if count:
        words = out.view(_WORDS.get(width, torch.uint8))
        pack_kernel[(triton.cdiv(groups, _BLOCK),)](codes, words, count, WIDTH=width, BLOCK=_BLOCK)
    return out[: triton.cdiv(count * width, 8)]


def unpack(data: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Undo `pack`."""
    groups = triton.cdiv(count, 8)
    codes = torch.empty(count, dtype=torch.uint8, device=data.device)
    if count:
        padded = torch.nn.functional.pad(data, (0, groups * width - data.numel()))
        words = padded.view(_WORDS.get(width, torch.uint8))
        grid = (triton.cdiv(groups, _BLOCK),)
        unpack_kernel[grid](words, codes, count, WIDTH=width, BLOCK=_BLOCK)
    return codes
