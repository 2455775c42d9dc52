"""The definition of how a channel's table is chosen, one channel at a time in Python's integers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.ladder.bins import LEAST, shift_of
from kvserve_kernels.ladder.tables import KEEP


def choose(values: NDArray[np.int16], prices: Sequence[Sequence[int]]) -> list[int]:
    """Return the table of each channel.

    That is 0 if all its values are; else the cheapest by the prices, the first among equals; but the one of the channel
    after it where that costs at most `KEEP` more. (From the last to the first is how rANS encodes.)

    Args:
        values: ``[channels, tokens]``.
        prices: For each table the price of each bin, in 1/1024 bits.
    """
    chosen: list[int] = []
    for row in values[::-1]:
        magnitudes = [abs(int(v)) for v in row]
        counts = [sum(low <= m for m in magnitudes) for low in LEAST]
        if counts[1] == 0:
            chosen.append(0)
            continue
        inside = [n - m for n, m in zip(counts, [*counts[1:], 0], strict=True)]
        shift = shift_of(len(row))
        # rounded up, so that what occurs at all counts
        rounded = [-(-n >> shift) for n in inside]
        costs = [sum(n * p for n, p in zip(rounded, table, strict=True)) for table in prices[1:]]
        least = min(costs)
        after = chosen[-1] if chosen else 0
        keeps = after > 0 and costs[after - 1] <= least + (KEEP >> shift)
        chosen.append(after if keeps else costs.index(least) + 1)
    return chosen[::-1]
