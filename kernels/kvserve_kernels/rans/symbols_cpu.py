"""Values to symbols, raw low bits and escapes, and back, on the CPU."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit
from kvserve_kernels.rans.models import Model
from kvserve_kernels.rans.rans_cpu import LANES


@njit
def _split(values, tables, bases, low_bits, spans, symbols):  # type: ignore[no-untyped-def]
    for c in range(values.shape[0]):
        table = tables[c]
        base = bases[table]
        k = low_bits[table]
        span = spans[table]
        outside = np.int32(span >> k)
        for t in range(values.shape[1]):
            v = np.int32(values[c, t]) - base
            symbols[c, t] = np.uint8(v >> k if (v >= 0) & (v < span) else outside)


@njit
def _low_planes(values, tables, bases, low_bits, out):  # type: ignore[no-untyped-def]
    at = 0
    tokens = values.shape[1]
    for c in range(values.shape[0]):
        table = tables[c]
        for g in range(0, tokens, LANES):
            for bit in range(low_bits[table]):
                word = np.uint32(0)
                for t in range(g, min(g + LANES, tokens)):
                    v = np.int32(values[c, t]) - bases[table]
                    word |= ((np.uint32(v) >> np.uint32(bit)) & np.uint32(1)) << np.uint32(t - g)
                out[at] = word
                at += 1


@njit
def _escapes(values, symbols, tables, escape_symbols, out):  # type: ignore[no-untyped-def]
    at = 0
    for c in range(values.shape[0]):
        escape = escape_symbols[tables[c]]
        if escape < 0:
            continue
        for t in range(values.shape[1]):
            if symbols[c, t] == escape:
                if at < out.shape[0]:
                    out[at] = values[c, t]
                at += 1
    return at


@njit
def _merge(symbols, tables, bases, low_bits, escape_symbols, planes, escapes, values):  # type: ignore[no-untyped-def]
    at = 0
    escaped = 0
    tokens = symbols.shape[1]
    for c in range(symbols.shape[0]):
        table = tables[c]
        base = bases[table]
        k = low_bits[table]
        for t in range(tokens):
            values[c, t] = np.int16((np.int32(symbols[c, t]) << k) + base)
        if k > 0:
            for g in range(0, tokens, LANES):
                for bit in range(k):
                    word = planes[at]
                    at += 1
                    for t in range(g, min(g + LANES, tokens)):
                        one = np.int16((word >> np.uint32(t - g)) & np.uint32(1))
                        values[c, t] += np.int16(one << np.int16(bit))
        escape = escape_symbols[table]
        if escape >= 0:
            for t in range(tokens):
                if symbols[c, t] == escape:
                    if escaped < escapes.shape[0]:
                        values[c, t] = escapes[escaped]
                    escaped += 1
    return escaped


def plane_words(models: Sequence[Model], tables: NDArray[np.uint8], tokens: int) -> int:
    """Return the number of uint32 words that the raw low bits take."""
    bits = np.array([model.low_bits for model in models], np.int64)
    return int(bits[tables].sum()) * (-(-tokens // LANES))


def split(
    values: NDArray[np.int16], tables: NDArray[np.uint8], models: Sequence[Model]
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.int16]]:
    """Return symbols ``[channels, tokens]``, planes of raw low bits and escaped values.

    A plane word holds one bit of 32 tokens, token 0 lowest; planes follow each other by channel, group of 32 tokens and
    bit. Escaped values follow each other by channel and token.
    """
    bases, low_bits, spans, escape_symbols = _parameters(models)
    symbols = np.empty(values.shape, np.uint8)
    _split(values, tables, bases, low_bits, spans, symbols)
    planes = np.empty(plane_words(models, tables, values.shape[1]), np.uint32)
    _low_planes(values, tables, bases, low_bits, planes)
    none = np.empty(0, np.int16)
    escapes = np.empty(_escapes(values, symbols, tables, escape_symbols, none), np.int16)
    if escapes.size:
        _escapes(values, symbols, tables, escape_symbols, escapes)
    return symbols, planes, escapes


def merge(
    symbols: NDArray[np.uint8],
    tables: NDArray[np.uint8],
    models: Sequence[Model],
    planes: NDArray[np.uint32],
    escapes: NDArray[np.int16],
) -> NDArray[np.int16] | None:
    """Undo `split`; None if the number of escapes is not that of the escape symbols.

    Args:
        symbols: ``[channels, tokens]`` uint8.
        tables: ``[channels]`` uint8, each below the number of models.
        models: The models.
        planes: ``[plane_words(...)]`` uint32.
        escapes: ``[count]`` int16.
    """
    if planes.size != plane_words(models, tables, symbols.shape[1]):
        raise ValueError("the planes do not fit the models")
    bases, low_bits, _, escape_symbols = _parameters(models)
    values = np.empty(symbols.shape, np.int16)
    count = _merge(symbols, tables, bases, low_bits, escape_symbols, planes, escapes, values)
    return values if count == escapes.size else None


def _parameters(
    models: Sequence[Model],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return bases, low bits, spans and escape symbols (-1 for none), each ``[tables]`` int32."""
    return (
        np.array([m.base for m in models], np.int32),
        np.array([m.low_bits for m in models], np.int32),
        np.array([m.span for m in models], np.int32),
        np.array([len(m.frequencies) - 1 if m.escape else -1 for m in models], np.int32),
    )
