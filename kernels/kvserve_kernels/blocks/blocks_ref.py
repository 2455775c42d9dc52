"""The definition of blocks: token after token into a paged cache, from any token of the first block on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def put(
    rows: NDArray[Any], blocks: NDArray[np.int64], cache: NDArray[Any], *, first: int = 0
) -> None:
    """Copy rows into blocks; see `kvserve_kernels.blocks.put`."""
    index, token = np.divmod(np.arange(first, first + len(rows)), cache.shape[2])
    cache[blocks[index], :, token] = rows


def take(
    rows: NDArray[Any], blocks: NDArray[np.int64], cache: NDArray[Any], *, first: int = 0
) -> None:
    """Copy blocks into rows; see `kvserve_kernels.blocks.take`."""
    index, token = np.divmod(np.arange(first, first + len(rows)), cache.shape[2])
    rows[:] = cache[blocks[index], :, token]
