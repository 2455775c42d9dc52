"""Sums inside GPU kernels in the one order that their definitions have: float64, one term after the other."""

import triton
import triton.language as tl

from kvserve_kernels.bits_triton import widen


@triton.jit
def parted(x):  # type: ignore[no-untyped-def]
    """Return the four columns of ``[rows, 4]``; none leaves its thread, which has loaded them together."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def mean_squares(x, row, rows, dim):  # type: ignore[no-untyped-def]
    """Return the mean of the squares of each of some rows of ``[rows, dim]``, summed from left to right, float64."""
    total = tl.zeros(row.shape, tl.float64)
    known = (row < rows)[:, None]
    j = tl.arange(0, 4)[None, :]
    for start in range(0, dim, 4):
        inside = known & (start + j < dim)
        four = tl.load(x + row[:, None] * dim + (start + j), mask=inside, other=0)
        # a square of float32 is exact in float64, so that fusing it with the sum changes nothing
        a, b, c, d = parted(widen(four))
        a, b, c, d = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
        total = (((total + a * a) + b * b) + c * c) + d * d
    return total / dim
