"""Packing of small codes: code i takes bits ``i * width`` to ``(i + 1) * width`` of the output, least bit first."""

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit


@njit
def _pack4(codes, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0] // 2):
        out[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
    if codes.shape[0] % 2:
        out[codes.shape[0] // 2] = codes[codes.shape[0] - 1]


@njit
def _unpack4(data, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0] // 2):
        out[2 * i] = data[i] & 15
        out[2 * i + 1] = data[i] >> 4
    if out.shape[0] % 2:
        out[out.shape[0] - 1] = data[out.shape[0] // 2] & 15


@njit
def _pack2(codes, out):  # type: ignore[no-untyped-def]
    whole = codes.shape[0] // 4
    for i in range(whole):
        c = 4 * i
        out[i] = codes[c] | (codes[c + 1] << 2) | (codes[c + 2] << 4) | (codes[c + 3] << 6)
    for i in range(4 * whole, codes.shape[0]):
        out[whole] |= codes[i] << (2 * (i - 4 * whole))


@njit
def _unpack2(data, out):  # type: ignore[no-untyped-def]
    whole = out.shape[0] // 4
    for i in range(whole):
        for k in range(4):
            out[4 * i + k] = (data[i] >> (2 * k)) & 3
    for i in range(4 * whole, out.shape[0]):
        out[i] = (data[whole] >> (2 * (i - 4 * whole))) & 3


@njit
def _pack(codes, width, out):  # type: ignore[no-untyped-def]
    held = np.uint32(0)
    bits = 0
    at = 0
    for i in range(codes.shape[0]):
        held |= np.uint32(codes[i]) << np.uint32(bits)
        bits += width
        while bits >= 8:
            out[at] = np.uint8(held & np.uint32(255))
            held >>= np.uint32(8)
            bits -= 8
            at += 1
    if bits > 0:
        out[at] = np.uint8(held)


@njit
def _unpack(data, width, out):  # type: ignore[no-untyped-def]
    held = np.uint32(0)
    bits = 0
    at = 0
    mask = np.uint32((1 << width) - 1)
    for i in range(out.shape[0]):
        if bits < width:
            held |= np.uint32(data[at]) << np.uint32(bits)
            bits += 8
            at += 1
        out[i] = np.uint8(held & mask)
        held >>= np.uint32(width)
        bits -= width


def packed_nbytes(count: int, width: int) -> int:
    """Return the bytes that so many codes take."""
    return (count * width + 7) // 8


def pack(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Pack codes.

    Args:
        codes: ``[count]`` uint8, each below ``2 ** width``.
        width: Bits a code, 1 to 8.

    Returns:
        ``[packed_nbytes(count, width)]`` uint8, unused bits zero; for width 8 the codes themselves.
    """
    if width == 8:
        return codes
    out = np.zeros(packed_nbytes(codes.shape[0], width), np.uint8)
    if width == 4:
        _pack4(codes, out)
    elif width == 2:
        _pack2(codes, out)
    else:
        _pack(codes, width, out)
    return out


def unpack(data: NDArray[np.uint8], count: int, width: int) -> NDArray[np.uint8]:
    """Undo `pack`.

    Args:
        data: ``[packed_nbytes(count, width)]`` uint8.
        count: Number of codes.
        width: Bits a code, 1 to 8.
    """
    if data.shape[0] != packed_nbytes(count, width):
        raise ValueError(f"{count} codes of {width} bits do not take {data.shape[0]} bytes")
    if width == 8:
        return data
    out = np.empty(count, np.uint8)
    if width == 4:
        _unpack4(data, out)
    elif width == 2:
        _unpack2(data, out)
    else:
        _unpack(data, width, out)
    return out
