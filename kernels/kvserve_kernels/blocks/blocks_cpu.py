"""Rows of numbers into the blocks of a paged cache, and back, by native code where there is some."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.blocks import blocks_ref
from kvserve_kernels.native import Simd, coder, simd


def put(
    rows: NDArray[Any], blocks: NDArray[np.int64], cache: NDArray[Any], *, first: int = 0
) -> None:
    """Copy rows into blocks, one after the other.

    Args:
        rows: ``[tokens, heads, dim]``, contiguous, any dtype.
        blocks: Which blocks.
        cache: ``[blocks, heads, block_tokens, dim]`` of the same dtype, any strides.
        first: The token of the first block that the first row belongs to.

    Raises:
        ValueError: Rows and cache are not alike, or these blocks have fewer tokens.
        IndexError: There is no such block.
    """
    _copy("kvserve_blocks_put", blocks_ref.put, rows, blocks, cache, first)


def take(
    rows: NDArray[Any], blocks: NDArray[np.int64], cache: NDArray[Any], *, first: int = 0
) -> None:
    """Copy blocks into rows; the inverse of `put`, with the same arguments and errors."""
    _copy("kvserve_blocks_take", blocks_ref.take, rows, blocks, cache, first)


def _copy(
    native: str,
    plain: Callable[..., None],
    rows: NDArray[Any],
    blocks: NDArray[np.int64],
    cache: NDArray[Any],
    first: int,
) -> None:
    """Check the arguments, and copy by the native function if there is one for them."""
    count, heads, size, dim = cache.shape
    if (
        rows.shape[1:] != (heads, dim)
        or rows.dtype != cache.dtype
        or not rows.flags.c_contiguous
        or not 0 <= first < size
        or first + len(rows) > len(blocks) * size
    ):
        raise ValueError(
            f"rows {rows.shape} from token {first} on do not fit {len(blocks)} blocks of {cache.shape[1:]}"
        )
    if len(blocks) and not 0 <= blocks.min() <= blocks.max() < count:
        raise IndexError(f"there are {count} blocks, not {blocks}")
    library = coder()
    if library is None or simd() == Simd.NUMBA or rows.itemsize != 2:
        plain(rows, blocks, cache, first=first)
        return
    blocks = np.ascontiguousarray(blocks, np.int64)
    form = np.array([heads, size, dim, *(stride // 2 for stride in cache.strides)], np.int64)
    address = form.ctypes.data
    getattr(library, native)(
        blocks.ctypes.data, first, len(rows), rows.ctypes.data,
        address, address + 3 * form.itemsize, cache.ctypes.data,
    )  # fmt: skip
