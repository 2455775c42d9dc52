"""The byte format of levels coded with the ladder, a fixed family of tables that needs no calibration.

====================  ===========================================================================================
part                  content
====================  ===========================================================================================
head                  mode u8 (0 plain, 1 rANS), n u8, groups of 32 tokens a stream u16, escapes u32, escapes
                      among the table numbers u32
plain levels          mode 0 only, n, groups and escapes 0, and then nothing follows: i16, channel-major
table numbers         n = 255: u8 each. Else their differences, channel 0 to 0 first, as a body of one channel of
                      as many tokens as there are channels, coded with table n, 65,535 groups a stream
zeros                 to a multiple of 4
body                  absent, and groups 0, if all channels have table 0
====================  ===========================================================================================

A body is

====================  ===========================================================================================
word counts           u32 for each stream
states                u32 for each lane of each stream; a stream has min(32, its tokens) lanes
planes                u32: raw low bits, one bit of 32 tokens a word, by channel, group of tokens, bit
words                 u16, stream after stream
escapes               i16, by channel and token
====================  ===========================================================================================

Tables are those of `kvserve_kernels.ladder`, whose numbers never change; table 0 says that a channel is all zeros, and
takes no part in the streams. Channels are ``layer, kv_head, head_dim``, the last fastest, or the components of a
transform. A stream covers successive groups of 32 tokens of all channels. Plain bounds the size.
"""

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import ladder, rans
from kvserve_strategies.reader import Reader
from kvserve_strategies.stage import Array, Bytes

_HEAD: Final = struct.Struct("<BBHII")
_PLAIN: Final = 0
_RANS: Final = 1
_PLAIN_NUMBERS: Final = 255
_MOST_GROUPS: Final = 65_535
# a stream ends with 128 bytes of states. Several streams at once are what fills a processor, eight being best
_SYMBOLS_PER_STREAM: Final = 131_072
_LEAST_GROUPS: Final = 4
_U32, _U16, _I16 = np.dtype(np.uint32), np.dtype(np.uint16), np.dtype(np.int16)


def coded_nbytes(count: int) -> int:
    """Return the most bytes that so many levels can take."""
    return _HEAD.size + 2 * count


def encode_levels(levels: NDArray[np.int16]) -> tuple[Array, ...]:
    """Code levels.

    Args:
        levels: ``[channels, tokens]`` int16, contiguous, about zero-mean; any value is carried.

    Returns:
        Arrays to be written one after the other.
    """
    live = ladder.live(levels)
    groups = stream_groups(int(np.count_nonzero(live)), levels.shape[1])
    if groups == 0:
        return (np.frombuffer(_HEAD.pack(_RANS, 0, 0, 0, 0), np.uint8),)
    ids, coded = ladder.encode(levels, live, groups)
    number_table, number_escapes, numbers = _encode_numbers(ids)
    head = _HEAD.pack(_RANS, number_table, groups, coded.escapes.size, number_escapes)
    pieces = (np.frombuffer(head, np.uint8), *numbers, *_body(coded))
    if sum(piece.nbytes for piece in pieces) < coded_nbytes(levels.size):
        return pieces
    return np.frombuffer(_HEAD.pack(_PLAIN, 0, 0, 0, 0), np.uint8), levels


def decode_levels(section: Bytes, channels: int, tokens: int) -> NDArray[np.int16]:
    """Undo `encode_levels`.

    Args:
        section: The bytes, aligned to 4; anything may be in them.
        channels: Channels, at least 1.
        tokens: Tokens, at least 1.

    Returns:
        ``[channels, tokens]`` int16.

    Raises:
        WireError: The bytes are not what `encode_levels` writes.
    """
    reader = Reader(section, "ladder")
    mode, number_table, groups, escapes, number_escapes = _HEAD.unpack(reader.bytes(_HEAD.size))
    if mode == _PLAIN and number_table == groups == escapes == number_escapes == 0:
        plain = reader.array(channels * tokens, _I16).reshape(channels, tokens)
        reader.done()
        return plain
    if mode != _RANS:
        raise reader.malformed(f"mode {mode}")
    ids = _decode_numbers(reader, channels, number_table, number_escapes)
    reader.align(4)
    if not ladder.tables().is_coded[ids].any():
        if groups or escapes:
            raise reader.malformed("a body is announced where all is zero")
        reader.done()
        return np.zeros((channels, tokens), np.int16)
    if groups < 1:
        raise reader.malformed("no groups")
    levels = _decode_body(reader, ids, groups, tokens, escapes)
    reader.done()
    return levels


def stream_groups(coded: int, tokens: int) -> int:
    """Return the groups of 32 tokens a stream for so many coded channels, as it is written; 0 for none."""
    if coded == 0:
        return 0
    groups = -(-tokens // rans.LANES)
    streams = max(1, coded * tokens // _SYMBOLS_PER_STREAM)
    return min(max(-(-groups // streams), _LEAST_GROUPS), groups, _MOST_GROUPS)


def _encode_numbers(ids: NDArray[np.uint8]) -> tuple[int, int, tuple[Array, ...]]:
    """Return table and escapes of the table numbers, and their bytes."""
    differences = np.diff(ids.astype(np.int16), prepend=np.int16(0)).reshape(1, -1)
    table, coded = ladder.encode(differences, np.ones(1, np.uint8), _MOST_GROUPS)
    if table[0] == 0:
        return 0, 0, ()
    body = _body(coded)
    nbytes = sum(piece.nbytes for piece in body)
    if nbytes < ids.size:
        return int(table[0]), coded.escapes.size, (*body, np.zeros(-nbytes % 4, np.uint8))
    return _PLAIN_NUMBERS, 0, (ids, np.zeros(-ids.size % 4, np.uint8))


def _decode_numbers(reader: Reader, channels: int, table: int, escapes: int) -> NDArray[np.uint8]:
    """Return the table of each channel."""
    count = len(ladder.tables().models)
    if table == _PLAIN_NUMBERS and escapes == 0:
        ids = reader.array(channels, np.dtype(np.uint8))
        if ids.max() >= count:
            raise reader.malformed("a channel names a table that is not there")
        return ids
    if table >= count:
        raise reader.malformed(f"no table {table}")
    if table == 0:
        if escapes:
            raise reader.malformed("escapes among zeros")
        return np.zeros(channels, np.uint8)
    differences = _decode_body(reader, np.array([table], np.uint8), _MOST_GROUPS, channels, escapes)
    numbers = np.cumsum(differences[0], dtype=np.int64)
    if numbers.min() < 0 or numbers.max() >= count:
        raise reader.malformed("a channel names a table that is not there")
    return numbers.astype(np.uint8)


def _body(coded: rans.Coded) -> tuple[Array, ...]:
    """Return the arrays of a body."""
    counts = np.array([words.size for words in coded.words], np.uint32)
    return counts, *coded.states, coded.planes, *coded.words, coded.escapes


def _decode_body(
    reader: Reader, ids: NDArray[np.uint8], groups: int, tokens: int, escapes: int
) -> NDArray[np.int16]:
    """Return the values of a body."""
    tables = ladder.tables()
    streams = rans.streams(tokens, groups)
    counts: list[Any] = reader.array(len(streams), _U32).tolist()
    coded = rans.Coded(
        states=[reader.array(min(rans.LANES, len(stream)), _U32) for stream in streams],
        planes=reader.array(tables.plane_words(ids, tokens), _U32),
        words=[reader.array(count, _U16) for count in counts],
        escapes=reader.array(escapes, _I16),
    )
    values = rans.decode_values(coded, ids, tables, groups, tokens)
    if values is None:
        raise reader.malformed("a stream does not end where it must, or escapes are missing")
    return values
