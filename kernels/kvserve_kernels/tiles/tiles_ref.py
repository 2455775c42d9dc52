"""The definition of tiles: rows of numbers whose pairs, of dimensions or of tokens, lie in an order of their own."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = {2: np.uint16, 4: np.uint32}
_PAIR = {2: np.uint32, 4: np.uint64}


def put(
    rows: NDArray[Any], blocks: NDArray[np.int64], tiles: NDArray[Any], *, of_tokens: bool
) -> None:
    """Copy rows into blocks of tiles; see `kvserve_kernels.tiles.put`."""
    size = rows.itemsize
    words = np.ascontiguousarray(rows).view(_WORD[size])
    if of_tokens:
        pairs = words[0::2].astype(_PAIR[size]) | (words[1::2].astype(_PAIR[size]) << 8 * size)
    else:
        pairs = words.view(_PAIR[size])
    _, heads, outer, inner, groups, columns = tiles.shape
    pairs = pairs.reshape(len(blocks), outer, inner, heads, groups, columns)
    tiles[blocks] = pairs.transpose(0, 3, 1, 2, 4, 5)


def take(
    rows: NDArray[Any], blocks: NDArray[np.int64], tiles: NDArray[Any], *, of_tokens: bool
) -> None:
    """Copy blocks of tiles into rows; see `kvserve_kernels.tiles.take`."""
    size = rows.itemsize
    words = rows.view(_WORD[size])
    heads = tiles.shape[1]
    pairs = np.ascontiguousarray(tiles[blocks].transpose(0, 2, 3, 1, 4, 5))
    if of_tokens:
        pairs = pairs.reshape(-1, heads, rows.shape[2])
        words[0::2] = pairs.astype(_WORD[size])
        words[1::2] = (pairs >> 8 * size).astype(_WORD[size])
    else:
        words[:] = pairs.view(_WORD[size]).reshape(rows.shape)
