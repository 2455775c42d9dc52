"""Static probability tables made from the data itself: which channels share one, and what it holds.

Integer arithmetic but for logarithms that are rounded, so that every machine makes the same tables.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit
from kvserve_kernels.native import Simd, coder, simd
from kvserve_kernels.rans.rans_cpu import MAX_SYMBOLS, TOTAL

MAX_TABLES = 16
MAX_LOW_BITS = 11
_VALUES_PER_TABLE = 16_384
ESCAPE_BITS = 16
_BIT = 4096
# histograms that stay in the nearest caches have more counters for a value
_NARROW = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """How the values of some channels become symbols, and how likely each symbol is.

    A value v is symbol ``(v - base) >> low_bits`` with its low bits sent raw. If ``escape``, the last symbol stands for
    every value outside, which is sent whole.

    Attributes:
        base: The least value of symbol 0.
        low_bits: Bits a value that are sent raw, 0 to 11.
        escape: Whether the last symbol is the escape.
        frequencies: 1 to 32 integers that sum to 4096.
    """

    base: int
    low_bits: int
    escape: bool
    frequencies: tuple[int, ...]

    @property
    def span(self) -> int:
        """The number of successive values, from ``base`` on, that need no escape."""
        return (len(self.frequencies) - self.escape) << self.low_bits


@njit
def _spreads(values, out):  # type: ignore[no-untyped-def]
    for c in range(values.shape[0]):
        total = np.int64(0)
        for t in range(values.shape[1]):
            total += abs(np.int64(values[c, t]))
        out[c] = total


@njit
def _extremes(values):  # type: ignore[no-untyped-def]
    least = values[0, 0]
    most = least
    for c in range(values.shape[0]):
        for t in range(values.shape[1]):
            v = values[c, t]
            least = min(least, v)
            most = max(most, v)
    return least, most


@njit
def _histograms(values, tables, least, out):  # type: ignore[no-untyped-def]
    # some counters in turn: neighbours are often equal, and an increment would wait for the one before
    for c in range(values.shape[0]):
        row = out[tables[c]]
        last = row.shape[0] - 1
        for t in range(values.shape[1]):
            row[t & last, np.int64(values[c, t]) - least] += 1


def assign(values: NDArray[np.int16], max_tables: int) -> NDArray[np.uint8]:
    """Group channels of like spread.

    Args:
        values: ``[channels, tokens]`` int16.
        max_tables: Most groups to make, 1 to 16; fewer if the tables would cost more than they gain.

    Returns:
        ``[channels]`` uint8: the table of each channel, ascending with mean magnitude.
    """
    channels = values.shape[0]
    count = max(1, min(max_tables, values.size // _VALUES_PER_TABLE, channels))
    spreads, _ = _survey(values)
    tables = np.empty(channels, np.uint8)
    tables[np.argsort(spreads, kind="stable")] = np.arange(channels) * count // channels
    return tables


def build(values: NDArray[np.int16], tables: NDArray[np.uint8]) -> list[Model]:
    """Return one model for each table, fitted to the channels that use it."""
    _, (least, most) = _survey(values)
    width = int(most) - int(least) + 1
    ways = 8 if width <= _NARROW else 2
    counts = np.zeros((int(tables.max()) + 1, ways, width), np.int64)
    library = coder()
    if library is None or simd() == Simd.NUMBA:
        _histograms(values, tables, int(least), counts)
    else:
        library.kvserve_histograms(
            values.ctypes.data, *values.shape, tables.ctypes.data, int(least), ways, width,
            counts.ctypes.data,
        )  # fmt: skip
    return [_fit(row, int(least)) for row in counts.sum(axis=1)]


def _survey(values: NDArray[np.int16]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return the sum of magnitudes of each channel, and the least and the greatest value of all."""
    spreads, extremes = np.empty(values.shape[0], np.int64), np.empty(2, np.int16)
    library = coder()
    if library is None or simd() == Simd.NUMBA:
        _spreads(values, spreads)
        extremes[:] = _extremes(values)
    else:
        library.kvserve_spreads(
            values.ctypes.data, *values.shape, spreads.ctypes.data, extremes.ctypes.data
        )
    return spreads, extremes


def _fit(counts: NDArray[np.int64], least: int) -> Model:
    """Return the cheapest model for counts of the values from ``least`` on.

    Tried are all numbers of low bits, each with the window of values that needs fewest escapes, up to the first that
    needs none; more low bits would only cost more.
    """
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    if last - first < MAX_SYMBOLS:
        # what fits as it is needs no search
        frequencies = tuple(normalise(counts[first : last + 1]))
        return Model(base=least + first, low_bits=0, escape=False, frequencies=frequencies)
    total = int(counts.sum())
    cumulated = np.concatenate([[0], np.cumsum(counts)])
    best: tuple[int, Model] | None = None
    for low_bits in range(MAX_LOW_BITS + 1):
        whole = last - first < MAX_SYMBOLS << low_bits
        width = (MAX_SYMBOLS - 1) << low_bits
        inside = cumulated[width:] - cumulated[:-width]
        start, stop = first, last + 1
        if not whole:
            start = int(inside.argmax())
            stop = start + width
        cells = np.add.reduceat(counts[:stop], np.arange(start, stop, 1 << low_bits))
        outside = total - int(cells.sum())
        cells = np.append(cells, outside) if outside else cells
        cost = _cost(cells) + (low_bits * (total - outside) + ESCAPE_BITS * outside) * _BIT
        if best is None or cost < best[0]:
            frequencies = tuple(normalise(cells))
            best = (
                cost,
                Model(
                    base=least + start,
                    low_bits=low_bits,
                    escape=outside > 0,
                    frequencies=frequencies,
                ),
            )
        if whole:
            break
    assert best is not None
    return best[1]


def _cost(cells: NDArray[np.int64]) -> int:
    """Return the entropy of so many symbols of each kind, in 1/4096 bits.

    Rounded for each kind, so that the last bit of a logarithm, which differs from library to library, does not count.
    """
    total = int(cells.sum())
    return sum(int(n) * round(_BIT * math.log2(total / int(n))) for n in cells if n)


def normalise(counts: NDArray[np.int64]) -> list[int]:
    """Scale counts to sum 4096, each that is above 0 to at least 1, by largest remainders.

    Args:
        counts: 1 to 32 counts, not all 0.
    """
    total = int(counts.sum())
    exact = [int(count) * TOTAL for count in counts]
    frequencies = [max(e // total, 1) if e else 0 for e in exact]
    missing = TOTAL - sum(frequencies)
    rounded_down = [i for i, e in enumerate(exact) if e >= total]
    for i in sorted(rounded_down, key=lambda i: (-(exact[i] % total), i))[: max(missing, 0)]:
        frequencies[i] += 1
    # rarities raised to 1 are paid for by the most frequent
    for _ in range(max(-missing, 0)):
        frequencies[max(range(len(frequencies)), key=lambda i: (frequencies[i], -i))] -= 1
    return frequencies
