"""The bytes of a payload, around the sections that chains write.

A payload is the length of each section (u64) and then the sections, each followed by zeros to a multiple of 8. They are
in the order of the rectangles that the parts of the strategy cut the piece into (see `kvserve_strategies.split`), and
for each in the order of its chain.
"""

from collections.abc import Sequence

import numpy as np

from kvserve_api.errors import WireError, WireReason
from kvserve_api.wire import Buffer
from kvserve_strategies.stage import Array, Bytes


def payload_nbytes(sections: Sequence[tuple[Array, ...]]) -> int:
    """Return the bytes that sections take as a payload."""
    return 8 * len(sections) + sum(_padded(_nbytes(section)) for section in sections)


def payload_bound(bounds: Sequence[int]) -> int:
    """Return the most bytes of a payload whose sections have at most so many."""
    return 8 * len(bounds) + sum(map(_padded, bounds))


def write_payload(sections: Sequence[tuple[Array, ...]], out: Bytes) -> None:
    """Write sections as a payload into ``[payload_nbytes(sections)]`` bytes."""
    lengths = np.array([_nbytes(section) for section in sections], np.uint64)
    at = lengths.nbytes
    out[:at] = lengths.view(np.uint8)
    for section in sections:
        for piece in section:
            out[at : at + piece.nbytes] = piece.reshape(-1).view(np.uint8)
            at += piece.nbytes
        gap = -_nbytes(section) % 8
        out[at : at + gap] = 0
        at += gap


def read_payload(data: Bytes, bounds: Sequence[Sequence[int]]) -> list[list[Bytes]]:
    """Return the sections of each chain, which share the payload's memory.

    Args:
        data: The payload; anything may be in it.
        bounds: For each chain the most bytes of each of its sections.

    Raises:
        WireError: It is not a payload of such sections.
    """
    count = sum(map(len, bounds))
    if data.size < 8 * count:
        raise WireError(WireReason.MALFORMED, f"{data.size} bytes can't hold {count} lengths")
    lengths = iter(data[: 8 * count].view(np.uint64).tolist())
    at = 8 * count
    sections: list[list[Bytes]] = []
    for piece in bounds:
        sections.append([])
        for bound in piece:
            size = next(lengths)
            end = at + _padded(size)
            if size > bound or end > data.size:
                raise WireError(
                    WireReason.MALFORMED,
                    f"a section of {size} bytes at {at}; most is {bound}, end is {data.size}",
                )
            sections[-1].append(data[at : at + size])
            if size % 8 and data[at + size : end].any():
                raise WireError(WireReason.MALFORMED, "padding is not zero")
            at = end
    if at != data.size:
        raise WireError(WireReason.MALFORMED, f"{data.size - at} bytes too many")
    return sections


def own_bytes(buffer: Buffer) -> Bytes:
    """Return the bytes as a writable array that starts at a multiple of 8, copied only if they do not.

    Writable, because a kernel is compiled once more for read-only memory, and that would be in the midst of serving.
    """
    data = np.frombuffer(buffer, np.uint8)
    return data if data.flags.writeable and data.ctypes.data % 8 == 0 else data.copy()


def _nbytes(section: tuple[Array, ...]) -> int:
    return sum(piece.nbytes for piece in section)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
