"""The Walsh–Hadamard transform on a GPU, sum by sum as in `hadamard_ref`; compiled with ``enable_fp_fusion=False``."""

import torch
import triton
import triton.language as tl

from kvserve_kernels.bits_triton import as_bits, narrow, widen
from kvserve_kernels.hadamard.hadamard_ref import block_size

_VALUES = 4096


@triton.jit
def transform_kernel(  # type: ignore[no-untyped-def]
    x, out, blocks, factor, SIZE: tl.constexpr, STAGES: tl.constexpr, SEVERAL: tl.constexpr
):
    """Transform `SEVERAL` blocks of `SIZE` values."""
    block = tl.program_id(0).to(tl.int64) * SEVERAL + tl.arange(0, SEVERAL)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (block < blocks)[:, None]
    v = widen(tl.load(x + place, mask=inside, other=0)) * factor
    for stage in tl.static_range(STAGES):
        v = tl.reshape(v, [SEVERAL, SIZE >> (stage + 1), 2, 1 << stage])
        a, b = tl.split(tl.permute(v, (0, 1, 3, 2)))
        v = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
        v = tl.reshape(v, [SEVERAL, SIZE])
    tl.store(out + place, narrow(v, out.dtype.element_ty), mask=inside)


def hadamard(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Transform each block of each row; its own inverse.

    Args:
        x: ``[rows, dim]`` bfloat16 or float32, contiguous. A block is the largest power of two that divides ``dim``.
        dtype: float32, or to restore bfloat16, to which it rounds.

    Returns:
        The shape of ``x``; overflow is held at the largest number.
    """
    size = block_size(x.shape[1])
    blocks = x.numel() // size
    several = max(1, _VALUES // size)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    # rounded once, as the definition's factor is
    factor = float(torch.tensor(size**-0.5, dtype=torch.float32))
    transform_kernel[(triton.cdiv(blocks, several),)](
        as_bits(x),
        as_bits(out),
        blocks,
        factor,
        SIZE=size,
        STAGES=size.bit_length() - 1,
        SEVERAL=several,
        enable_fp_fusion=False,
    )
    return out
