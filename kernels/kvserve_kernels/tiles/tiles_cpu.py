"""Rows of numbers into tiles with pairs side by side, as matrix units like them, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.native import Simd, coder, simd
from kvserve_kernels.tiles import tiles_ref


def put(
    rows: NDArray[Any], blocks: NDArray[np.int64], tiles: NDArray[Any], *, of_tokens: bool
) -> None:
    """Copy rows into blocks of tiles.

    Args:
        rows: ``[tokens, heads, dim]``, contiguous: numbers of two or four bytes, for one block after the other.
        blocks: Which blocks.
        tiles: ``[blocks, heads, outer, inner, groups, columns]``, any strides: pairs as single elements of twice the
            size. Tokens are outer times inner, dimensions groups times columns, whichever is paired counted in pairs.
        of_tokens: Whether two tokens make a pair, else two dimensions.

    Raises:
        ValueError: The rows do not fill the blocks.
        IndexError: There is no such block.
    """
    _copy("kvserve_tiles", tiles_ref.put, rows, blocks, tiles, of_tokens=of_tokens)


def take(
    rows: NDArray[Any], blocks: NDArray[np.int64], tiles: NDArray[Any], *, of_tokens: bool
) -> None:
    """Copy blocks of tiles into rows; the inverse of `put`, with the same arguments and errors."""
    _copy("kvserve_tiles_back", tiles_ref.take, rows, blocks, tiles, of_tokens=of_tokens)


def _copy(
    native: str,
    plain: Callable[..., None],
    rows: NDArray[Any],
    blocks: NDArray[np.int64],
    tiles: NDArray[Any],
    *,
    of_tokens: bool,
) -> None:
    """Check the arguments, and copy by the native function if there is one for them."""
    count, heads, outer, inner, groups, columns = tiles.shape
    pair = (2, 1) if of_tokens else (1, 2)
    wanted = (len(blocks) * outer * inner * pair[0], heads, groups * columns * pair[1])
    if rows.shape != wanted or not rows.flags.c_contiguous:
        raise ValueError(f"rows {rows.shape} do not fill {len(blocks)} blocks of {tiles.shape[1:]}")
    if len(blocks) and not 0 <= blocks.min() <= blocks.max() < count:
        raise IndexError(f"there are {count} blocks, not {blocks}")
    library = coder()
    if library is None or simd() == Simd.NUMBA or rows.itemsize != 2:
        plain(rows, blocks, tiles, of_tokens=of_tokens)
        return
    blocks = np.ascontiguousarray(blocks, np.int64)
    form = np.array([*tiles.shape[1:], *(stride // 4 for stride in tiles.strides)], np.int64)
    address = form.ctypes.data
    getattr(library, native)(
        of_tokens, len(blocks), blocks.ctypes.data, rows.ctypes.data,
        address, address + 5 * form.itemsize, tiles.ctypes.data,
    )  # fmt: skip
