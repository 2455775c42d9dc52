"""Cache values inside GPU kernels: a bfloat16 travels as the int16 of its bits, float16 and float32 as they are.

Conversions of bfloat16 are integer arithmetic: they round as `bits_ref` says wherever they run, in Triton's interpreter
too, which cuts instead of rounding.
"""

import torch
import triton
import triton.language as tl

LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)
LARGEST_FLOAT16 = tl.constexpr(65504.0)
LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as kernels take it: bfloat16 as int16, others unchanged."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """Return float32 of bfloat16 bits (int16), float16 or float32."""
    if x.dtype == tl.int16:  # noqa: SIM108 - branches differ in what compiles
        wide = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return finite float32 to nearest even in int16 (bfloat16), float16 or float32, held at the largest number."""
    if tl.int16 == TYPE:
        held = tl.minimum(tl.maximum(x, -LARGEST_BFLOAT16), LARGEST_BFLOAT16)
        bits = held.to(tl.uint32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    elif tl.float16 == TYPE:
        near = tl.minimum(tl.maximum(x, -LARGEST_FLOAT16), LARGEST_FLOAT16).to(tl.float16)
    else:
        near = tl.minimum(tl.maximum(x, -LARGEST_FLOAT32), LARGEST_FLOAT32)
    return near
