"""Interleaved rANS on the CPU: 32 lanes are 32 tokens of one channel and share one stream of 16-bit words.

State 32 bits with lower bound 2**16, 12-bit probabilities, tables of at most 32 symbols. A stream covers a range of
tokens of all channels. The decoder walks channels, in each the groups of 32 tokens, in each the lanes, all ascending,
and takes a word whenever a state falls below the bound; the encoder walks backwards. So the table is the same for all
lanes (no gather on a CPU with wide registers) and a GPU warp can decode the very same stream.

After J. Duda, "Asymmetric numeral systems" (2013), and F. Giesen, "Interleaved entropy coders" (2014).
"""

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit

LANES = 32
PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
MAX_SYMBOLS = 32
_LOWER = np.uint32(1 << 16)
_SHIFT = np.uint32(PROBABILITY_BITS)
_MASK = np.uint32(TOTAL - 1)


@njit
def _encode(symbols, first, stop, tables, frequencies, starts, reciprocals, states, words):  # type: ignore[no-untyped-def]
    at = words.shape[0]
    groups = (stop - first + LANES - 1) // LANES
    for lane in range(states.shape[0]):
        states[lane] = _LOWER
    for c in range(symbols.shape[0] - 1, -1, -1):
        table = tables[c]
        for g in range(groups - 1, -1, -1):
            base = first + g * LANES
            for lane in range(min(LANES, stop - base) - 1, -1, -1):
                s = symbols[c, base + lane]
                f = frequencies[table, s]
                x = states[lane]
                # written in any case and kept if due: a branch here would be mispredicted all the time
                words[at - 1] = np.uint16(x & np.uint32(0xFFFF))
                due = np.uint32((x >> np.uint32(20)) >= f)
                at -= np.int64(due)
                x = np.uint32(x >> (due << np.uint32(4)))
                q = np.uint32((np.uint64(x) * reciprocals[table, s]) >> np.uint64(44))
                states[lane] = x + starts[table, s] + q * (np.uint32(TOTAL) - f)
    return at


@njit
def _decode(words, states, tables, slots, symbols, first, stop):  # type: ignore[no-untyped-def]
    groups = (stop - first + LANES - 1) // LANES
    last = words.shape[0] - 1
    at = 0
    for c in range(symbols.shape[0]):
        table = tables[c]
        for g in range(groups):
            base = first + g * LANES
            for lane in range(min(LANES, stop - base)):
                x = states[lane]
                entry = slots[table, x & _MASK]
                symbols[c, base + lane] = np.uint8(entry & np.uint32(0xFF))
                f = (entry >> np.uint32(20)) + np.uint32(1)
                x = f * (x >> _SHIFT) + ((entry >> np.uint32(8)) & _MASK)
                low = x < _LOWER
                # an index past the end is held at the last word: the caller sees that `at` ran over
                word = np.uint32(words[min(at, last)])
                states[lane] = (x << np.uint32(16)) | word if low else x
                at += 1 if low else 0
    return at


def encode(
    symbols: NDArray[np.uint8],
    tokens: range,
    tables: NDArray[np.uint8],
    frequencies: NDArray[np.uint32],
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Code one stream.

    Args:
        symbols: ``[channels, tokens]`` uint8, contiguous; each has a frequency above 0 in its channel's table.
        tokens: The tokens that the stream covers.
        tables: ``[channels]`` uint8, the table of each channel.
        frequencies: ``[tables, 32]`` uint32, each row of sum 4096.

    Returns:
        The states ``[min(32, len(tokens))]`` that decoding starts from, and the words ``[count]``.
    """
    starts = np.zeros_like(frequencies)
    starts[:, 1:] = np.cumsum(frequencies[:, :-1], axis=1)
    # floor(x / f) = x * reciprocal >> 44 exactly, because a renormalised x is below f << 20
    reciprocals = (1 << 44) // np.maximum(frequencies, 1).astype(np.uint64) + np.uint64(1)
    states = np.empty(min(LANES, len(tokens)), np.uint32)
    words = np.empty(symbols.shape[0] * len(tokens) + 1, np.uint16)
    at = _encode(
        symbols, tokens.start, tokens.stop, tables, frequencies, starts, reciprocals, states, words
    )
    return states, words[at:]


def slot_tables(frequencies: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return for each table and each of 4096 slots ``(frequency - 1) << 20 | offset << 8 | symbol``.

    Args:
        frequencies: ``[tables, 32]`` uint32, each row of sum 4096.
    """
    slots = np.empty((frequencies.shape[0], TOTAL), np.uint32)
    for row, frequency in zip(slots, frequencies, strict=True):
        symbols = np.repeat(np.arange(frequency.size, dtype=np.uint32), frequency)
        starts = np.cumsum(frequency) - frequency
        offsets = np.arange(TOTAL, dtype=np.uint32) - starts[symbols].astype(np.uint32)
        row[:] = (frequency[symbols] - 1) << 20 | offsets << 8 | symbols
    return slots


def decode(
    words: NDArray[np.uint16],
    states: NDArray[np.uint32],
    tables: NDArray[np.uint8],
    slots: NDArray[np.uint32],
    symbols: NDArray[np.uint8],
    tokens: range,
) -> bool:
    """Decode one stream into its tokens' columns of ``symbols``; whatever the words hold, nothing else is touched.

    Args:
        words: ``[count]`` uint16.
        states: ``[min(32, len(tokens))]`` uint32; left as they are.
        tables: ``[channels]`` uint8, each below the number of tables.
        slots: ``[tables, 4096]``, from `slot_tables`.
        symbols: ``[channels, tokens]`` uint8, contiguous; written.
        tokens: The tokens that the stream covers.

    Returns:
        Whether the stream ended as an encoder leaves it: all words used, all states at their start.
    """
    padded = words if words.size else np.zeros(1, np.uint16)
    running = states.copy()
    used = _decode(padded, running, tables, slots, symbols, tokens.start, tokens.stop)
    return bool(used == words.size and (running == _LOWER).all())
