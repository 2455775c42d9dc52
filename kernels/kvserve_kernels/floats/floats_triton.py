"""Splitting floats into exponents and the rest on a GPU, and joining them; the bytes of `floats_ref`."""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    words, exponents, rest, count, MANTISSA: tl.constexpr, BLOCK: tl.constexpr
):
    """Split `BLOCK` floats."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(words + place, mask=place < count, other=0)
    TOP: tl.constexpr = w.dtype.primitive_bitwidth - 1
    # sign extension would set bits above the sign: they are cut off again
    bits = w.to(tl.int32).to(tl.uint32, bitcast=True)
    sign = (bits >> TOP) & 1
    exponent = (bits >> MANTISSA) & ((1 << (TOP - MANTISSA)) - 1)
    remaining = (bits & ((1 << MANTISSA) - 1)) | (sign << MANTISSA)
    tl.store(exponents + place, exponent.to(tl.uint8), mask=place < count)
    tl.store(rest + place, remaining.to(rest.dtype.element_ty), mask=place < count)


@triton.jit
def join_kernel(  # type: ignore[no-untyped-def]
    exponents, rest, words, count, MANTISSA: tl.constexpr, BLOCK: tl.constexpr
):
    """Join `BLOCK` floats."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    TOP: tl.constexpr = words.dtype.element_ty.primitive_bitwidth - 1
    exponent = tl.load(exponents + place, mask=place < count, other=0).to(tl.uint32)
    remaining = tl.load(rest + place, mask=place < count, other=0)
    bits = remaining.to(tl.int32).to(tl.uint32, bitcast=True)
    sign = (bits >> MANTISSA) & 1
    word = (bits & ((1 << MANTISSA) - 1)) | (exponent << MANTISSA) | (sign << TOP)
    word = word.to(tl.int32, bitcast=True).to(words.dtype.element_ty)
    tl.store(words + place, word, mask=place < count)


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split each float into exponent and rest.

    Args:
        x: ``[count]`` bfloat16, float16 or float32, contiguous.

    Returns:
        Exponents, uint8, and ``sign << mantissa bits | mantissa``: uint8 for bfloat16, else int16 or int32.
    """
    words = x.view(_WORDS[x.dtype])
    exponents = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    rest_type = torch.uint8 if x.dtype == torch.bfloat16 else words.dtype
    rest = torch.empty(x.shape, dtype=rest_type, device=x.device)
    split_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
        words, exponents, rest, x.numel(), MANTISSA=_MANTISSA[x.dtype], BLOCK=_BLOCK
    )
    return exponents, rest


def join(exponents: torch.Tensor, rest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo `split`, to floats of the given type."""
    out = torch.empty(exponents.shape, dtype=dtype, device=exponents.device)
    join_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        exponents,
        rest,
        out.view(_WORDS[dtype]),
        out.numel(),
        MANTISSA=_MANTISSA[dtype],
        BLOCK=_BLOCK,
    )
    return out
