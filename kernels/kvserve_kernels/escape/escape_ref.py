"""The definition of escape coding of bytes.

A book holds the sixteen most frequent bytes, the lesser first among equals, in rising order. Each byte becomes its
place in the book, in 4 bits, the first of two in the low half; a byte that is not in the book becomes 0 and is listed
with its position in its chunk of 65,536 bytes.
"""

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.escape.escape_cpu import CHUNK, CODES, Escaped


def encode(data: NDArray[np.uint8]) -> Escaped:
    """Code bytes."""
    counts = np.bincount(data, minlength=256)
    book = np.sort(np.argsort(-counts, kind="stable")[:CODES]).astype(np.uint8)
    known = np.isin(data, book)
    codes = np.where(known, np.searchsorted(book, data), 0).astype(np.uint8)
    codes = np.append(codes, np.zeros(len(data) % 2, np.uint8))
    halves = codes.reshape(-1, 2)
    at = np.flatnonzero(~known)
    chunks = -(-len(data) // CHUNK)
    return Escaped(
        book=book,
        codes=(halves[:, 0] | halves[:, 1] << 4).astype(np.uint8),
        counts=np.bincount(at // CHUNK, minlength=chunks).astype(np.uint32),
        positions=(at % CHUNK).astype(np.uint16),
        values=data[at],
    )


def decode(coded: Escaped, count: int) -> NDArray[np.uint8]:
    """Undo `encode`."""
    codes = np.stack([coded.codes & 15, coded.codes >> 4], axis=1).reshape(-1)[:count]
    data = coded.book[codes]
    starts = np.repeat(np.arange(len(coded.counts)) * CHUNK, coded.counts)
    data[starts + coded.positions] = coded.values
    return data
