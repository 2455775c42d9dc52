"""Whole matrices of integers to rANS streams and back: native code if there is some, else numba; the same bytes."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.native import Simd, coder, simd
from kvserve_kernels.rans import rans_cpu, symbols_cpu
from kvserve_kernels.rans.models import Model
from kvserve_kernels.rans.rans_cpu import LANES, MAX_SYMBOLS, TOTAL

# beyond the symbols of a stream: what wide stores may write below its first word
_SLACK: Final = 32
_NO_ROOM: Final = 3
# what C asks of an array
_WHOLE: Final = ("C", "A")


@dataclass(frozen=True, slots=True)
class Tables:
    """Models in the form that coders look them up in; made once for models that never change.

    Attributes:
        models: The models.
        frequencies: ``[models, 32]`` uint32, each row of sum 4096.
        is_coded: ``[models]`` bool: whether its symbols take bits at all, which a single one does not.
        low_bits: ``[models]`` int64.
    """

    models: tuple[Model, ...]
    frequencies: NDArray[np.uint32]
    is_coded: NDArray[np.bool_]
    low_bits: NDArray[np.int64]
    _made: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[Model]) -> "Tables":
        """Return the tables of 1 to 256 models."""
        frequencies = np.zeros((len(models), MAX_SYMBOLS), np.uint32)
        for row, model in zip(frequencies, models, strict=True):
            row[: len(model.frequencies)] = model.frequencies
        return cls(
            models=tuple(models),
            frequencies=frequencies,
            is_coded=frequencies.max(axis=1) < TOTAL,
            low_bits=np.array([model.low_bits for model in models], np.int64),
        )

    def plane_words(self, ids: NDArray[np.uint8], tokens: int) -> int:
        """Return the number of uint32 words that the raw low bits take."""
        return int(self.low_bits[ids].sum()) * -(-tokens // LANES)

    def native(self, library: ctypes.CDLL) -> NDArray[np.uint8]:
        """Return the C structures."""
        if "native" not in self._made:
            out = np.empty(len(self.models) * library.kvserve_table_nbytes(), np.uint8)
            columns = [
                np.array(column, np.int32)
                for column in (
                    [model.base for model in self.models],
                    self.low_bits,
                    [model.escape for model in self.models],
                    [len(model.frequencies) for model in self.models],
                )
            ]
            library.kvserve_tables(
                len(self.models), *map(_at, columns), _at(self.frequencies), _at(out)
            )
            self._made["native"] = out
        return self._made["native"]

    def slots(self, library: ctypes.CDLL | None) -> NDArray[np.uint32]:
        """Return `slot_tables` of the frequencies."""
        if "slots" not in self._made:
            if library is None:
                self._made["slots"] = rans_cpu.slot_tables(self.frequencies)
            else:
                out = np.empty((len(self.models), TOTAL), np.uint32)
                library.kvserve_slots(len(self.models), _at(self.frequencies), _at(out))
                self._made["slots"] = out
        return self._made["slots"]


@dataclass(frozen=True, slots=True)
class Coded:
    """A coded matrix.

    Attributes:
        states: uint32 of each stream, one for each of its ``min(32, tokens)`` lanes.
        planes: uint32: raw low bits, one bit of 32 tokens a word, by channel, group of tokens, bit.
        words: uint16 of each stream.
        escapes: int16, by channel and token.
    """

    states: list[NDArray[np.uint32]]
    planes: NDArray[np.uint32]
    words: list[NDArray[np.uint16]]
    escapes: NDArray[np.int16]


def streams(tokens: int, groups: int) -> list[range]:
    """Return the tokens of each stream, if one has so many groups of 32."""
    size = groups * LANES
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def encode_values(
    values: NDArray[np.int16], ids: NDArray[np.uint8], tables: Tables, groups: int
) -> Coded:
    """Code integers.

    Args:
        values: ``[channels, tokens]`` int16, contiguous.
        ids: ``[channels]`` uint8, the table of each channel, which must hold its values.
        tables: The tables.
        groups: Groups of 32 tokens a stream, 1 to 65,535.
    """
    level, library = simd(), coder()
    if level != Simd.NUMBA and library is not None:
        room = tables.plane_words(ids, values.shape[1])
        return encode_natively(library, values, ids, tables, groups, room, None)
    symbols, planes, escapes = symbols_cpu.split(values, ids, tables.models)
    live = tables.is_coded[ids]
    coded = [
        rans_cpu.encode(symbols[live], part, ids[live], tables.frequencies)
        for part in streams(values.shape[1], groups)
    ]
    return Coded([s for s, _ in coded], planes, [w for _, w in coded], escapes)


class _Room(ctypes.Structure):
    """What ``Coded`` in coder.h is."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("plane_words", ctypes.c_int64),
        ("escapes", ctypes.c_void_p),
        ("escaped", ctypes.c_int64),
    )


def encode_natively(
    library: ctypes.CDLL,
    values: NDArray[np.int16],
    ids: NDArray[np.uint8],
    tables: Tables,
    groups: int,
    plane_words: int,
    prices: NDArray[Any] | None,
) -> Coded:
    """Do as `encode_values` by C.

    Args:
        library: The library.
        values: ``[channels, tokens]`` int16, contiguous.
        ids: ``[channels]`` uint8; if there are prices, written where they are not 0.
        tables: The tables.
        groups: Groups of 32 tokens a stream.
        plane_words: The most words that raw low bits may take.
        prices: What ``Prices`` in rans.h holds, to choose tables by.
    """
    channels, tokens = values.shape
    parts = streams(tokens, groups)
    capacity = channels * len(parts[0]) + _SLACK
    words = np.empty((len(parts), capacity), np.uint16)
    counts = np.empty(len(parts), np.uint32)
    states = np.empty((len(parts), LANES), np.uint32)
    planes = np.empty(plane_words, np.uint32)
    escapes = np.empty(values.size + tokens, np.int16)
    room = _Room(
        _at(words), capacity, _at(counts), _at(states), _at(planes), plane_words, _at(escapes),
        escapes.size,
    )  # fmt: skip
    status = library.kvserve_encode(
        int(simd()), _at(values), channels, tokens, groups, _at(ids),
        None if prices is None else _at(prices), _at(tables.native(library)), ctypes.byref(room),
    )  # fmt: skip
    if status:
        raise MemoryError
    return Coded(
        [row[: len(part)] for row, part in zip(states, parts, strict=True)],
        planes[plane_words - room.plane_words :],
        [row[capacity - count :] for row, count in zip(words, counts.tolist(), strict=True)],
        escapes[escapes.size - room.escaped :],
    )


def decode_values(
    coded: Coded, ids: NDArray[np.uint8], tables: Tables, groups: int, tokens: int
) -> NDArray[np.int16] | None:
    """Undo `encode_values`; whatever is in ``coded``, nothing outside it is read.

    Args:
        coded: With as many streams, states and words of planes as shape and tables ask for; contents may be hostile.
        ids: ``[channels]`` uint8, each below the number of tables.
        tables: The tables.
        groups: Groups of 32 tokens a stream, at least 1.
        tokens: Tokens.

    Returns:
        ``[channels, tokens]`` int16, or None if a stream does not end as an encoder leaves it, or the number of escapes
        is not that of the escape symbols.

    Raises:
        ValueError: Streams, states or planes do not fit.
    """
    parts = streams(tokens, groups)
    lanes = [min(LANES, len(part)) for part in parts]
    if [state.size for state in coded.states] != lanes or len(coded.words) != len(parts):
        raise ValueError("the streams do not fit the shape")
    if coded.planes.size != tables.plane_words(ids, tokens) or ids.max() >= len(tables.models):
        raise ValueError("the planes do not fit the models")
    level, library = simd(), coder()
    if level == Simd.NUMBA or library is None:
        return _decode_by_numba(coded, ids, tables, parts)
    out = np.empty((ids.size, tokens), np.int16)
    words = _joined(coded.words)
    counts = np.array([stream.size for stream in coded.words], np.uint32)
    states = np.concatenate(coded.states)
    slots = None if level == Simd.AVX512 else _at(tables.slots(library))
    planes, escapes = (
        np.require(coded.planes, requirements=_WHOLE),
        np.require(coded.escapes, requirements=_WHOLE),
    )
    status = library.kvserve_decode(
        int(level), ids.size, tokens, groups, _at(ids), _at(tables.native(library)), slots,
        _at(words), _at(counts), _at(states), _at(planes), _at(escapes), escapes.size, _at(out),
    )  # fmt: skip
    if status == _NO_ROOM:
        raise MemoryError
    return out if status == 0 else None


def _decode_by_numba(
    coded: Coded, ids: NDArray[np.uint8], tables: Tables, parts: list[range]
) -> NDArray[np.int16] | None:
    live = tables.is_coded[ids]
    sole = tables.frequencies.argmax(axis=1).astype(np.uint8)
    tokens = parts[-1].stop
    symbols = np.repeat(sole[ids][:, None], tokens, axis=1)
    running = np.empty((int(live.sum()), tokens), np.uint8)
    slots = tables.slots(None)
    for part, state, word in zip(parts, coded.states, coded.words, strict=True):
        if not rans_cpu.decode(word, state, ids[live], slots, running, part):
            return None
    symbols[live] = running
    return symbols_cpu.merge(symbols, ids, tables.models, coded.planes, coded.escapes)


def _joined(parts: list[NDArray[np.uint16]]) -> NDArray[np.uint16]:
    """Return an array at whose address all parts follow each other, as the streams of a section do: then not copied."""
    stop = _at(parts[0])
    for part in parts:
        if not part.flags.c_contiguous or _at(part) != stop:
            return np.concatenate(parts)
        stop += part.nbytes
    return parts[0]


def _at(array: NDArray[Any]) -> int:
    # several times faster than array.ctypes.data
    return int(array.__array_interface__["data"][0])
