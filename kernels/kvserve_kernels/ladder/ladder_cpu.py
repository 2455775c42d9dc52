"""Choice of each channel's table and coding with it: native code if there is some, else numpy; see `ladder_ref`."""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.ladder.bins import LEAST, shift_of
from kvserve_kernels.ladder.tables import KEEP, prices, tables
from kvserve_kernels.native import Simd, coder, simd
from kvserve_kernels.rans.rans_cpu import LANES
from kvserve_kernels.rans.values import Coded, encode_natively, encode_values

_MAX_TABLES: Final = 256


def choose(values: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Return the table of each channel.

    Args:
        values: ``[channels, tokens]`` int16, contiguous.

    Returns:
        ``[channels]`` uint8.
    """
    level, library = simd(), coder()
    if level == Simd.NUMBA or library is None:
        return _choose_by_numpy(values)
    ids = np.empty(values.shape[0], np.uint8)
    library.kvserve_choose(
        int(level), values.ctypes.data, *values.shape, native_prices().ctypes.data, ids.ctypes.data
    )
    return ids


def live(values: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Return for each channel of ``[channels, tokens]`` 1, or 0 if it is all zero and so of table 0."""
    library = coder()
    if simd() == Simd.NUMBA or library is None:
        return np.asarray(values.any(axis=1), np.uint8)
    flags = np.empty(values.shape[0], np.uint8)
    library.kvserve_live(values.ctypes.data, *values.shape, flags.ctypes.data)
    return flags


def encode(
    values: NDArray[np.int16], live: NDArray[np.uint8], groups: int
) -> tuple[NDArray[np.uint8], Coded]:
    """Choose tables and code, in one go.

    Args:
        values: ``[channels, tokens]`` int16, contiguous.
        live: ``[channels]`` uint8, what `live` says of them.
        groups: Groups of 32 tokens a stream.

    Returns:
        As `choose`, and what `kvserve_kernels.rans.encode_values` gives for that.
    """
    library = coder()
    if simd() == Simd.NUMBA or library is None:
        ids = choose(values)
        return ids, encode_values(values, ids, tables(), groups)
    ids = live.copy()
    most_planes = values.shape[0] * int(tables().low_bits.max()) * -(-values.shape[1] // LANES)
    coded = encode_natively(library, values, ids, tables(), groups, most_planes, native_prices())
    return ids, coded


@cache
def native_prices() -> NDArray[np.uint8]:
    """Return what ``Prices`` in rans.h holds."""
    pairs = -(-len(LEAST) // 2)
    lengths = np.full((pairs, _MAX_TABLES, 2), np.iinfo(np.int16).max, np.int16)
    for bin_, column in enumerate(prices().T):
        lengths[bin_ // 2, : column.size, bin_ % 2] = column
    head = np.array([prices().shape[0], KEEP], np.int32)
    return np.concatenate([head.view(np.uint8), lengths.reshape(-1).view(np.uint8)])


def _choose_by_numpy(values: NDArray[np.int16]) -> NDArray[np.uint8]:
    channels, tokens = values.shape
    magnitudes = np.abs(values.astype(np.int32))
    counts = np.stack([(magnitudes >= low).sum(axis=1) for low in LEAST], axis=1)
    shift = shift_of(tokens)
    inside = -(-(counts - np.pad(counts[:, 1:], ((0, 0), (0, 1)))) >> shift)
    costs = inside @ prices().T.astype(np.int64)
    costs[:, 0] = np.iinfo(np.int64).max
    best, least = costs.argmin(axis=1), costs.min(axis=1)
    ids = np.empty(channels, np.uint8)
    after = 0
    for c in range(channels - 1, -1, -1):
        if counts[c, 1] == 0:
            after = 0
        elif after == 0 or costs[c, after] > least[c] + (KEEP >> shift):
            after = int(best[c])
        ids[c] = after
    return ids
