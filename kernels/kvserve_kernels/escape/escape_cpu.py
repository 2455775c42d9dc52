"""Escape coding of bytes on the CPU."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit

CODES: Final = 16
CHUNK: Final = 65_536
"""Bytes in which positions of escapes are counted anew, so that 16 bits hold them."""
_ESCAPE: Final = 128


@dataclass(frozen=True, slots=True)
class Escaped:
    """Coded bytes.

    Attributes:
        book: ``[16]`` uint8, rising: what each code means.
        codes: ``[ceil(count / 2)]`` uint8, two codes each, the first in the low half; 0 at an escape.
        counts: ``[ceil(count / 65536)]`` uint32: escapes in each chunk.
        positions: ``[escapes]`` uint16: where in its chunk each one is, rising.
        values: ``[escapes]`` uint8: the bytes themselves.
    """

    book: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    counts: NDArray[np.uint32]
    positions: NDArray[np.uint16]
    values: NDArray[np.uint8]


@njit
def _histogram(data, counts):  # type: ignore[no-untyped-def]
    # four counters in turn: neighbours are often equal, and an increment would wait for the one before
    for i in range(data.shape[0]):
        counts[i & 3, data[i]] += 1


@njit
def _encode(data, code_of, codes, counts, positions, values):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(codes.shape[0]):
        low = code_of[data[2 * i]]
        high = code_of[data[2 * i + 1]] if 2 * i + 1 < data.shape[0] else np.uint8(0)
        if (low | high) & _ESCAPE:
            for k in range(2):
                j = 2 * i + k
                if j < data.shape[0] and code_of[data[j]] == _ESCAPE:
                    counts[j // CHUNK] += np.uint32(1)
                    positions[at] = np.uint16(j % CHUNK)
                    values[at] = data[j]
                    at += 1
        codes[i] = (low & np.uint8(15)) | ((high & np.uint8(15)) << np.uint8(4))


@njit
def _decode(codes, pairs, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        out[i] = pairs[codes[i]]


@njit
def _patch(counts, positions, values, data):  # type: ignore[no-untyped-def]
    at = 0
    for chunk in range(counts.shape[0]):
        start = chunk * CHUNK
        before = np.int64(-1)
        for _ in range(counts[chunk]):
            position = np.int64(positions[at])
            if position <= before or start + position >= data.shape[0]:
                return False
            data[start + position] = values[at]
            before = position
            at += 1
    return True


def encode(data: NDArray[np.uint8]) -> Escaped:
    """Code ``[count]`` bytes; see `Escaped`."""
    four = np.zeros((4, 256), np.int64)
    _histogram(data, four)
    frequencies = four.sum(0)
    book = np.sort(np.argsort(-frequencies, kind="stable")[:CODES]).astype(np.uint8)
    code_of = np.full(256, _ESCAPE, np.uint8)
    code_of[book] = np.arange(CODES)
    escapes = data.size - int(frequencies[book].sum())
    coded = Escaped(
        book=book,
        codes=np.empty(-(-data.size // 2), np.uint8),
        counts=np.zeros(-(-data.size // CHUNK), np.uint32),
        positions=np.empty(escapes, np.uint16),
        values=np.empty(escapes, np.uint8),
    )
    _encode(data, code_of, coded.codes, coded.counts, coded.positions, coded.values)
    return coded


def decode(coded: Escaped, count: int) -> NDArray[np.uint8] | None:
    """Undo `encode`; None if positions do not rise or lie outside.

    Args:
        coded: ``counts`` must sum to the number of positions and values.
        count: Bytes to return.
    """
    pairs = coded.book.astype(np.uint16)[np.arange(256) & 15]
    pairs |= coded.book.astype(np.uint16)[np.arange(256) >> 4] << 8
    out = np.empty(coded.codes.size, np.uint16)
    _decode(coded.codes, pairs, out)
    data = out.view(np.uint8)[:count]
    return data if _patch(coded.counts, coded.positions, coded.values, data) else None
