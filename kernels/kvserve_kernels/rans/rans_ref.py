"""The definition of the rANS stream, one symbol at a time in Python's integers."""

import numpy as np
from numpy.typing import NDArray

_LANES = 32
_BITS = 12
_LOWER = 1 << 16


def _order(channels: int, tokens: range) -> list[tuple[int, int, int]]:
    """Return ``(channel, token, lane)`` in the order of decoding."""
    return [(c, t, (t - tokens.start) % _LANES) for c in range(channels) for t in tokens]


def encode(
    symbols: NDArray[np.uint8],
    tokens: range,
    tables: NDArray[np.uint8],
    frequencies: NDArray[np.uint32],
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Code the columns ``tokens`` of ``[channels, tokens]`` symbols; return states and words."""
    starts = np.cumsum(frequencies, axis=1) - frequencies
    states = [_LOWER] * min(_LANES, len(tokens))
    words: list[int] = []
    for c, t, lane in reversed(_order(symbols.shape[0], tokens)):
        f = int(frequencies[tables[c], symbols[c, t]])
        x = states[lane]
        if x >= f << (32 - _BITS):
            words.append(x & 0xFFFF)
            x >>= 16
        states[lane] = (x // f << _BITS) + x % f + int(starts[tables[c], symbols[c, t]])
    return np.array(states, np.uint32), np.array(words[::-1], np.uint16)


def decode(
    words: NDArray[np.uint16],
    states: NDArray[np.uint32],
    tables: NDArray[np.uint8],
    frequencies: NDArray[np.uint32],
    symbols: NDArray[np.uint8],
    tokens: range,
) -> None:
    """Undo `encode` into ``symbols``."""
    ends = np.cumsum(frequencies, axis=1)
    running = [int(state) for state in states]
    left = iter(words.tolist())
    for c, t, lane in _order(symbols.shape[0], tokens):
        x = running[lane]
        slot = x & ((1 << _BITS) - 1)
        s = int(np.searchsorted(ends[tables[c]], slot, side="right"))
        f = int(frequencies[tables[c], s])
        x = f * (x >> _BITS) + slot - (int(ends[tables[c], s]) - f)
        running[lane] = x << 16 | next(left) if x < _LOWER else x
        symbols[c, t] = s
