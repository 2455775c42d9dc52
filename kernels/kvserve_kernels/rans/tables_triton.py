"""Probability tables in the form that GPU kernels look them up in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_kernels.rans.models import Model
from kvserve_kernels.rans.rans_cpu import MAX_SYMBOLS, TOTAL, slot_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Probability tables and how values become symbols, on one device.

    Attributes:
        slots: ``[tables, 4096]`` int32, for each slot ``offset << 20 | symbol << 12 | frequency - 1``.
        divisors: ``[tables, 32]`` int64, what coding a symbol needs, see `divisor_tables`.
        facts: ``[tables, 4]`` int32: base, low bits, span, 1 if the last symbol is the escape.
        coded: ``[tables]`` bool: whether a value takes bits at all.
        sole: ``[tables]`` int16: the value of those that take none.
        planes: Whether a table has low bits.
        escapes: Whether a table has an escape.
    """

    slots: torch.Tensor
    divisors: torch.Tensor
    facts: torch.Tensor
    coded: torch.Tensor
    sole: torch.Tensor
    planes: bool
    escapes: bool


def put_tables(models: Sequence[Model], device: torch.device | str) -> Tables:
    """Return the tables of 1 to 256 models for a device."""
    frequencies = np.zeros((len(models), MAX_SYMBOLS), np.uint32)
    for row, model in zip(frequencies, models, strict=True):
        row[: len(model.frequencies)] = model.frequencies
    slots = slot_tables(frequencies)
    entries = (slots >> 8 & (TOTAL - 1)) << 20 | (slots & 0xFF) << 12 | slots >> 20
    facts = [(m.base, m.low_bits, m.span, int(m.escape)) for m in models]
    coded = (frequencies.max(axis=1) < TOTAL) | np.array([m.low_bits > 0 for m in models])
    sole = frequencies.argmax(axis=1) + np.array([m.base for m in models])
    return Tables(
        slots=torch.from_numpy(entries.astype(np.int32)).to(device),
        divisors=torch.from_numpy(divisor_tables(frequencies).view(np.int64)).to(device),
        facts=torch.tensor(facts, dtype=torch.int32).to(device),
        coded=torch.from_numpy(coded).to(device),
        sole=torch.from_numpy(sole.astype(np.int16)).to(device),
        planes=any(m.low_bits for m in models),
        escapes=any(m.escape for m in models),
    )


def divisor_tables(frequencies: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return for each symbol what codes it without a division.

    A state x that is coded is below ``f << 20``, so that ``floor(x / f)`` is ``(x + carry) * reciprocal >> 32 + shift``
    exactly, with ``shift = floor(log2(f))``: of the reciprocals rounded up (carry 0) and down (carry 1) one is off by
    at most half of f, and ``f / 2 * (f << 20)`` is at most ``2 ** (32 + shift)``.

    Args:
        frequencies: ``[tables, 32]`` uint32, each row of sum 4096.

    Returns:
        ``[tables, 32]`` uint64: ``reciprocal << 32 | shift << 28 | carry << 24 | start << 12 | 4096 - f``.
    """
    f = np.maximum(frequencies, 1).astype(np.uint64)
    start = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint64) & np.uint64(TOTAL - 1)
    shift = np.floor(np.log2(f)).astype(np.uint64)
    power = np.uint64(1) << (shift + np.uint64(32))
    down = (power - np.uint64(1)) // f
    above, below = (down + np.uint64(1)) * f - power, power - down * f
    # a power of two divides without a rest only by the reciprocal of 33 bits: the one below it, with a carry, does
    carry = (below < above) | (down + np.uint64(1) > np.uint64(0xFFFFFFFF))
    reciprocal = np.where(carry, down, down + np.uint64(1))
    rest = (
        shift << np.uint64(28) | carry.astype(np.uint64) << np.uint64(24) | start << np.uint64(12)
    )
    made: NDArray[np.uint64] = reciprocal << np.uint64(32) | rest | (np.uint64(TOTAL) - f)
    return made
