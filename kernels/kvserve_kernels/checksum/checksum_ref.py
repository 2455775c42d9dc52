"""XXH64 in plain integers: the definition that the fast path must agree with."""

from itertools import pairwise

_MASK = (1 << 64) - 1
_P1 = 0x9E3779B185EBCA87
_P2 = 0xC2B2AE3D27D4EB4F
_P3 = 0x165667B19E3779F9
_P4 = 0x85EBCA77C2B2AE63
_P5 = 0x27D4EB2F165667C5


def _rotl(x: int, n: int) -> int:
    return ((x << n) | (x >> (64 - n))) & _MASK


def _round(acc: int, lane: int) -> int:
    return _rotl((acc + lane * _P2) & _MASK, 31) * _P1 & _MASK


def checksum(data: bytes) -> int:
    """Return the XXH64 of the bytes with seed 0."""
    stripes = len(data) // 32 * 32
    if stripes:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        for start in range(0, stripes, 32):
            for i in range(4):
                at = start + 8 * i
                lanes[i] = _round(lanes[i], int.from_bytes(data[at : at + 8], "little"))
        h = sum(_rotl(x, n) for x, n in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            h = ((h ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        h = _P5
    h = (h + len(data)) & _MASK
    words = len(data) // 8 * 8
    for start, end in pairwise(range(stripes, words + 1, 8)):
        lane = int.from_bytes(data[start:end], "little")
        h = (_rotl(h ^ _round(0, lane), 27) * _P1 + _P4) & _MASK
    if len(data) - words >= 4:
        half = int.from_bytes(data[words : words + 4], "little")
        h = (_rotl(h ^ (half * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        words += 4
    for byte in data[words:]:
        h = _rotl(h ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    h = (h ^ (h >> 33)) * _P2 & _MASK
    h = (h ^ (h >> 29)) * _P3 & _MASK
    return h ^ (h >> 32)
