"""The linear transform's GPU kernels; `linear_triton` says how they go together.

Matrices are padded to whole blocks, so that inner loops have nothing to mask. Products and sums of float32 must not be
fused: compile with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from kvserve_kernels.bits_triton import narrow, widen
from kvserve_kernels.rotate.rotate_triton import pair_members


@triton.jit
def scaled_pairs(  # type: ignore[no-untyped-def]
    native,
    slots,
    heads,
    rotations,
    mean,
    inv_scale,
    cos,
    sin,
    token,
    tokens,
    row_stride,
    token_stride,
    head_stride,
    slot,
    count,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Return both members of the pairs of some slots, turned back, centred and scaled, and where they belong."""
    k = tl.arange(0, HALF)[None, :]
    first, second = pair_members(k, DIM, PAIRS, INTERLEAVED)
    known = slot < count
    inside = known[:, None] & (k < DIM // 2)
    row = tl.load(slots + slot, mask=known, other=0).to(tl.int64)
    head = tl.load(heads + slot, mask=known, other=0).to(tl.int64)
    values = native + (row * row_stride + token * token_stride + head * head_stride)[:, None]
    a = widen(tl.load(values + first, mask=inside, other=0))
    b = widen(tl.load(values + second, mask=inside, other=0))
    if PAIRS > 0:
        rotation = tl.load(rotations + slot, mask=known, other=-1)
        turns = (rotation >= 0)[:, None] & (k < PAIRS)
        angle = (rotation.to(tl.int64) * tokens + token)[:, None] * PAIRS + k
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        a, b = a * c + b * s, b * c - a * s
    at = slot[:, None] * DIM + first
    to = slot[:, None] * DIM + second
    a = (a - tl.load(mean + at, mask=inside, other=0.0)) * tl.load(
        inv_scale + at, mask=inside, other=0.0
    )
    b = (b - tl.load(mean + to, mask=inside, other=0.0)) * tl.load(
        inv_scale + to, mask=inside, other=0.0
    )
    return a, b, at, to, inside


@triton.jit
def peak_of(a, b):  # type: ignore[no-untyped-def]
    """Return the greater magnitude of each pair as bits: they compare as magnitudes do, and NaN is greater than all."""
    a = a.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    b = b.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(a, b)


@triton.jit
def store_rounded(x8, at, v, down, inside):  # type: ignore[no-untyped-def]
    """Write ``v * down`` to the nearest integer, ties to even: a sum with 1.5 * 2**23 leaves it in the low bits."""
    bits = (v * down + 12582912.0).to(tl.int32, bitcast=True)
    tl.store(x8 + at, bits.to(tl.int8), mask=inside)


@triton.jit
def prepare_kernel(  # type: ignore[no-untyped-def]
    native,
    slots,
    heads,
    rotations,
    mean,
    inv_scale,
    cos,
    sin,
    x8,
    shifts,
    tokens,
    row_stride,
    token_stride,
    head_stride,
    count,
    stride,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SLOTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Round one token of a group to int8, with the shift that its greatest magnitude needs.

    `SLOTS` are all there are if `WHOLE`; else values are computed twice.
    """
    token = tl.program_id(0).to(tl.int64)
    some = tl.arange(0, SLOTS)
    if WHOLE:
        a, b, at, to, inside = scaled_pairs(
            native, slots, heads, rotations, mean, inv_scale, cos, sin, token, tokens, row_stride,
            token_stride, head_stride, some, count, DIM, PAIRS, HALF, INTERLEAVED,
        )  # fmt: skip
        peaks = peak_of(a, b)
    else:
        peaks = tl.zeros([SLOTS, HALF], tl.uint32)
        for start in range(0, count, SLOTS):
            a, b, _, _, _ = scaled_pairs(
                native, slots, heads, rotations, mean, inv_scale, cos, sin, token, tokens, row_stride,
                token_stride, head_stride, start + some, count, DIM, PAIRS, HALF, INTERLEAVED,
            )  # fmt: skip
            peaks = tl.maximum(peaks, peak_of(a, b))
    peak = tl.max(tl.max(peaks, 1), 0)
    # the exponent of the least 127 * 2**e that is no smaller
    shift = tl.maximum(((peak + 0x1FFFF) >> 23).to(tl.int32) - 133, 0)
    shift = tl.minimum(shift, 127)
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    tl.store(shifts + token, shift.to(tl.int8))
    row = x8 + token * stride
    if WHOLE:
        store_rounded(row, at, a, down, inside)
        store_rounded(row, to, b, down, inside)
    else:
        for start in range(0, count, SLOTS):
            a, b, at, to, inside = scaled_pairs(
                native, slots, heads, rotations, mean, inv_scale, cos, sin, token, tokens, row_stride,
                token_stride, head_stride, start + some, count, DIM, PAIRS, HALF, INTERLEAVED,
            )  # fmt: skip
            store_rounded(row, at, a, down, inside)
            store_rounded(row, to, b, down, inside)


@triton.jit
def quantise_kernel(  # type: ignore[no-untyped-def]
    matrix,
    x8,
    shifts,
    factor,
    offset,
    levels,
    components,
    tokens,
    width,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Multiply a block of components by a block of tokens, and round the products to levels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    left = matrix + c.to(tl.int64)[:, None] * width + w[None, :]
    right = x8 + t.to(tl.int64)[None, :] * width + w[:, None]
    y = tl.zeros([BLOCK_C, BLOCK_T], tl.int32)
    for _ in range(0, width, BLOCK_W):
        y = tl.dot(tl.load(left), tl.load(right), y, out_dtype=tl.int32)
        left += BLOCK_W
        right += BLOCK_W
    shift = tl.load(shifts + t, mask=t < tokens, other=0).to(tl.int32)
    power = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    # rounding y to float32 and shifting it commute
    magnitude = tl.abs(y).to(tl.float32) * power[None, :] * tl.load(factor + c)[:, None]
    magnitude += tl.load(offset + c)[:, None]
    level = tl.minimum(magnitude, 32767.0).to(tl.int32)
    level = tl.where(y < 0, -level, level)
    place = c.to(tl.int64)[:, None] * tokens + t[None, :]
    inside = (c < components)[:, None] & (t < tokens)[None, :]
    tl.store(levels + place, level.to(tl.int16), mask=inside)


@triton.jit
def dequantise_kernel(  # type: ignore[no-untyped-def]
    levels, delta, restored, components, tokens, stride, BLOCK: tl.constexpr
):
    """Move the levels of one component towards zero by its delta, to bfloat16; where there is no level, write 0."""
    component = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (component < components) & (t < tokens)
    q = tl.load(levels + component * tokens + t, mask=known, other=0).to(tl.float32)
    r = tl.where(q == 0.0, 0.0, tl.abs(q) + tl.load(delta + component))
    bits = narrow(tl.where(q < 0.0, -r, r), tl.int16)
    if restored.dtype.element_ty == tl.float32:  # noqa: SIM108 - branches differ in type
        value = widen(bits)
    else:
        value = bits.to(tl.bfloat16, bitcast=True)
    tl.store(restored + component * stride + t, value, mask=t < stride)


@triton.jit
def expand_kernel(  # type: ignore[no-untyped-def]
    restored,
    inverse,
    slots,
    heads,
    rotations,
    mean,
    cos,
    sin,
    out,
    components,
    tokens,
    row_stride,
    token_stride,
    head_stride,
    count,
    stride,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Make the cache values of a block of tokens in `SLOTS` slots from all components."""
    # slots change fastest, so that the same components are read again while they are in the cache
    p = tl.arange(0, SLOTS * HALF)
    # the last slots may be computed twice, to the same values
    slot = tl.minimum(tl.program_id(0) * SLOTS, count - SLOTS) + p // HALF
    k = p % HALF
    known = k < DIM // 2
    if 2 * HALF != DIM:
        # a pair that does not exist is computed as the last that does, and not written
        k = tl.minimum(k, DIM // 2 - 1)
    first, second = pair_members(k, DIM, PAIRS, INTERLEAVED)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    width = count * DIM
    at = slot * DIM + first
    to = slot * DIM + second
    left = restored + c.to(tl.int64)[None, :] * stride + t[:, None]
    right = inverse + c.to(tl.int64)[:, None] * width
    a = tl.zeros([BLOCK_T, SLOTS * HALF], tl.float32)
    b = tl.zeros([BLOCK_T, SLOTS * HALF], tl.float32)
    for _ in range(0, components, BLOCK_C):
        r = tl.load(left)
        a = tl.dot(r, tl.load(right + at[None, :]), a, input_precision="ieee")
        b = tl.dot(r, tl.load(right + to[None, :]), b, input_precision="ieee")
        left += tl.cast(stride, tl.int64) * BLOCK_C
        right += tl.cast(width, tl.int64) * BLOCK_C
    a += tl.load(mean + at)[None, :]
    b += tl.load(mean + to)[None, :]
    inside = known[None, :] & (t < tokens)[:, None]
    if PAIRS > 0:
        rotation = tl.load(rotations + slot)
        turns = ((rotation >= 0) & (k < PAIRS))[None, :] & (t < tokens)[:, None]
        angle = (rotation.to(tl.int64)[None, :] * tokens + t[:, None]) * PAIRS + k[None, :]
        u = tl.load(cos + angle, mask=turns, other=1.0)
        v = tl.load(sin + angle, mask=turns, other=0.0)
        a, b = a * u - b * v, b * u + a * v
    part = tl.load(slots + slot).to(tl.int64) * row_stride
    part += tl.load(heads + slot).to(tl.int64) * head_stride
    values = out + part[None, :] + t.to(tl.int64)[:, None] * token_stride
    tl.store(values + first[None, :], narrow(a, out.dtype.element_ty), mask=inside)
    tl.store(values + second[None, :], narrow(b, out.dtype.element_ty), mask=inside)
