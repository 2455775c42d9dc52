"""Damaged payloads: cut, altered, spliced, with extreme numbers in heads, with lengths that fit and that do not."""

import random
import struct
from collections.abc import Callable, Sequence
from typing import Final

_EXTREME: Final = tuple(
    sorted(
        {
            number
            for bits in (1, 4, 7, 8, 12, 15, 16, 24, 31, 32, 40, 63, 64)
            for number in (0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits) - 8)
        }
    )
)
# of a payload of many lengths, and of the head of a section
_HEAD_NBYTES: Final = 48
Sections = list[bytes]


def join_sections(sections: Sequence[bytes]) -> bytearray:
    """Return the payload of sections, with true lengths."""
    payload = bytearray(struct.pack(f"<{len(sections)}Q", *map(len, sections)))
    for section in sections:
        payload += section
        payload += bytes(-len(section) % 8)
    return payload


def _cut(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _grow(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randint(1, 64))


def _flip(rng: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = rng.randrange(len(data))
    piece = rng.randbytes(rng.randint(1, 16))[: len(data) - at]
    data[at : at + len(piece)] = piece


def _number(rng: random.Random, data: bytearray, other: bytes) -> None:
    """Put an extreme number where a head may have one."""
    width = rng.choice((1, 2, 4, 8))
    reach = min(len(data), rng.choice((8, _HEAD_NBYTES, len(data))))
    at = rng.randrange(reach) // width * width
    near = len(data) + rng.randint(-9, 9)
    number = rng.choice(_EXTREME) if rng.random() < 0.9 else max(0, near)
    piece = (number % (1 << 8 * width)).to_bytes(width, "little")[: len(data) - at]
    data[at : at + len(piece)] = piece


def _splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    """Go on with another's bytes, mostly those at the same place."""
    at = rng.randrange(len(data))
    start = at if rng.random() < 0.7 else rng.randrange(len(other) + 1)
    data[at:] = other[start:]


def _noise(rng: random.Random, data: bytearray, other: bytes) -> None:
    data[:] = rng.randbytes(len(data))


def _fill(rng: random.Random, data: bytearray, other: bytes) -> None:
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    data[start:stop] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * (stop - start)


_DAMAGES: Final[tuple[Callable[[random.Random, bytearray, bytes], None], ...]] = (
    _cut,
    _grow,
    _flip,
    _overwrite,
    _number,
    _number,
    _splice,
    _noise,
    _fill,
)


def damage(rng: random.Random, data: bytes, other: bytes) -> bytearray:
    """Return bytes with one damage of any kind; ``other`` is what may be spliced in."""
    damaged = bytearray(data)
    if damaged:
        rng.choice(_DAMAGES)(rng, damaged, other)
    return damaged


def damage_section(rng: random.Random, sections: Sections, other: Sections) -> bytearray:
    """Return a payload, one of whose sections is damaged or another's, with lengths to match.

    Without true lengths most damages would never be seen by a stage.
    """
    full = [at for at, section in enumerate(sections) if section] or [0]
    at = rng.choice(full)
    theirs = rng.choice(other)
    mixed = list(sections)
    mixed[at] = theirs if rng.random() < 0.1 else bytes(damage(rng, sections[at], theirs))
    if rng.random() < 0.1:
        mixed[at] = bytes(damage(rng, mixed[at], theirs))
    return join_sections(mixed)
