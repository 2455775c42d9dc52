"""Sparse linear prediction on a GPU, the bits of `predict_ref.apply`; compiled with ``enable_fp_fusion=False``.

What to predict from is found by `predict_cpu.fit`: a pursuit whose steps depend on each other, for a quantiser that no
preset of ours uses.
"""

import torch
import triton
import triton.language as tl

_TOKENS = 16
_CHANNELS = 128


@triton.jit
def apply_kernel(  # type: ignore[no-untyped-def]
    before,
    sources,
    weights,
    out,
    tokens,
    channels,
    SOURCES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Predict a block of tokens and channels."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    inside = (token < tokens)[:, None] & known[None, :]
    row = token.to(tl.int64)[:, None] * channels
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for k in tl.static_range(SOURCES):
        source = tl.load(sources + channel * SOURCES + k, mask=known, other=0).to(tl.int32)
        weight = tl.load(weights + channel * SOURCES + k, mask=known, other=0.0).to(tl.float32)
        total += weight[None, :] * tl.load(before + row + source[None, :], mask=inside, other=0.0)
    tl.store(out + row + channel[None, :], total, mask=inside)


def apply(before: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the prediction ``[tokens, channels]``: the weighted sum of each channel's sources, in their order.

    Args:
        before: ``[tokens, channels]`` float32, contiguous.
        sources: ``[channels, sources]`` int32, each at least 0 and below the number of channels.
        weights: The same shape, float16.
    """
    tokens, channels = before.shape
    out = torch.empty_like(before)
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(tokens, _TOKENS))
    apply_kernel[grid](
        before,
        sources,
        weights,
        out,
        tokens,
        channels,
        SOURCES=sources.shape[1],
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
        enable_fp_fusion=False,
    )
    return out
