"""The byte format of rANS-coded integers, shared by the stages that use it.

====================  ===========================================================================================
part                  content
====================  ===========================================================================================
head                  mode u8 (0 plain, 1 rANS), tables u8, groups of 32 tokens a stream u16, escapes u32
plain values          mode 0 only, and then nothing follows: the values token-major, in their own type
word counts           u32 for each stream
states                u32 for each lane of each stream; a stream has min(32, its tokens) lanes
tables                each: base i16, low bits u8 (bit 7: has an escape), symbols n u8, n frequencies u16 (sum 4096)
table of each channel 4 bits each, low half first; absent if there is one table
zeros                 to a multiple of 4 from the head
planes                u32: raw low bits, one bit of 32 tokens a word, by channel, group of tokens, bit
words                 u16, stream after stream
escapes               i16, by channel and token
====================  ===========================================================================================

Channels are ``layer, kv_head, head_dim``, the last fastest; a stream covers successive groups of 32 tokens of all
channels. Plain is taken where rANS would not be smaller, which bounds the size.
"""

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import pack, rans
from kvserve_kernels.transpose import transpose
from kvserve_strategies.reader import Reader
from kvserve_strategies.stage import Array, Bytes

_HEAD: Final = struct.Struct("<BBHI")
_TABLE: Final = struct.Struct("<hBB")
_ESCAPE_FLAG: Final = 0x80
_PLAIN: Final = 0
_RANS: Final = 1
_VALUES_PER_STREAM: Final = 100_000
_WHAT: Final = "rANS"


def coded_nbytes(count: int, itemsize: int) -> int:
    """Return the most bytes that so many values can take."""
    return _HEAD.size + count * itemsize


def encode_integers(values: Array, *, max_tables: int) -> tuple[Array, ...]:
    """Code integers.

    Args:
        values: ``[layers, tokens, columns]`` uint8 or int16, contiguous.
        max_tables: Most probability tables to make, 1 to 16.

    Returns:
        Arrays to be written one after the other.
    """
    tokens = values.shape[1]
    by_channel = transpose(values, np.int16).reshape(-1, tokens)
    ids = rans.assign(by_channel, max_tables)
    tables = rans.Tables.of(rans.build(by_channel, ids))
    groups = -(-_VALUES_PER_STREAM // (rans.LANES * by_channel.shape[0]))
    coded = rans.encode_values(by_channel, ids, tables, groups)

    models = tables.models
    head = _HEAD.pack(_RANS, len(models), groups, coded.escapes.size)
    described = b"".join(_describe(model) for model in models)
    described += pack.pack(ids, 4).tobytes() if len(models) > 1 else b""
    described += bytes(-len(described) % 4)
    pieces: tuple[Array, ...] = (
        np.frombuffer(head, np.uint8),
        np.array([words.size for words in coded.words], np.uint32),
        *coded.states,
        np.frombuffer(described, np.uint8),
        coded.planes,
        *coded.words,
        coded.escapes,
    )
    if sum(piece.nbytes for piece in pieces) < coded_nbytes(values.size, values.itemsize):
        return pieces
    return np.frombuffer(_HEAD.pack(_PLAIN, 0, 0, 0), np.uint8), values


def decode_integers(section: Bytes, *, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Array:
    """Undo `encode_integers`.

    Args:
        section: The bytes, aligned to 8; anything may be in them.
        shape: ``(layers, tokens, columns)``.
        dtype: uint8 or int16.

    Raises:
        WireError: The bytes are not what `encode_integers` writes.
    """
    layers, tokens, columns = shape
    reader = Reader(section, _WHAT)
    mode, table_count, groups, escape_count = _HEAD.unpack(reader.bytes(_HEAD.size))
    if mode == _PLAIN and table_count == groups == escape_count == 0:
        plain = reader.array(layers * tokens * columns, dtype).reshape(shape)
        reader.done()
        return plain
    if mode != _RANS or not 1 <= table_count <= rans.MAX_TABLES or groups < 1:
        raise reader.malformed(f"mode {mode}, {table_count} tables, {groups} groups a stream")

    streams = rans.streams(tokens, groups)
    channels = layers * columns
    word_counts = reader.array(len(streams), np.dtype(np.uint32))
    states = [reader.array(min(rans.LANES, len(s)), np.dtype(np.uint32)) for s in streams]
    tables = rans.Tables.of([_read_model(reader) for _ in range(table_count)])
    ids = _read_ids(reader, channels, table_count)
    reader.align(4)
    planes = reader.array(tables.plane_words(ids, tokens), np.dtype(np.uint32))
    words = [reader.array(count, np.dtype(np.uint16)) for count in word_counts.tolist()]
    escapes = reader.array(escape_count, np.dtype(np.int16))
    reader.done()

    coded = rans.Coded(states=states, planes=planes, words=words, escapes=escapes)
    values = rans.decode_values(coded, ids, tables, groups, tokens)
    if values is None:
        raise reader.malformed("a stream does not end where it must, or escapes are missing")
    if dtype == np.uint8 and (values.min() < 0 or values.max() > 255):
        raise reader.malformed("a value is outside 0 to 255")
    return transpose(values.reshape(layers, columns, tokens), dtype.type)


def _describe(model: rans.Model) -> bytes:
    flags = model.low_bits | (_ESCAPE_FLAG if model.escape else 0)
    count = len(model.frequencies)
    return _TABLE.pack(model.base, flags, count) + struct.pack(f"<{count}H", *model.frequencies)


def _read_model(reader: Reader) -> rans.Model:
    base, flags, count = _TABLE.unpack(reader.bytes(_TABLE.size))
    low_bits = flags & ~_ESCAPE_FLAG
    if low_bits > rans.MAX_LOW_BITS or not 1 <= count <= rans.MAX_SYMBOLS:
        raise reader.malformed(f"a table has {low_bits} low bits and {count} symbols")
    frequencies = tuple(struct.unpack(f"<{count}H", reader.bytes(2 * count)))
    if sum(frequencies) != rans.TOTAL:
        raise reader.malformed("a table's frequencies do not sum to 4096")
    escape = bool(flags & _ESCAPE_FLAG)
    return rans.Model(base=base, low_bits=low_bits, escape=escape, frequencies=frequencies)


def _read_ids(reader: Reader, channels: int, table_count: int) -> NDArray[np.uint8]:
    if table_count == 1:
        return np.zeros(channels, np.uint8)
    ids = pack.unpack(reader.take(pack.packed_nbytes(channels, 4)), channels, 4)
    if ids.max() >= table_count:
        raise reader.malformed("a channel names a table that is not there")
    return ids
