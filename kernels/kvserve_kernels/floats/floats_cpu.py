"""Splitting floats into their exponent and the rest (sign and mantissa), and putting them together again."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.jit import njit

MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}


@njit
def _split(words, mantissa, exponents, rest):  # type: ignore[no-untyped-def]
    total = words.itemsize * 8
    low = (np.uint32(1) << np.uint32(mantissa)) - np.uint32(1)
    top = np.uint32(total - 1)
    m = np.uint32(mantissa)
    span = (np.uint32(1) << (top - m)) - np.uint32(1)
    for i in range(words.shape[0]):
        w = np.uint32(words[i])
        exponents[i] = np.uint8((w >> m) & span)
        rest[i] = (w & low) | ((w >> top) << m)


@njit
def _join(exponents, rest, mantissa, words):  # type: ignore[no-untyped-def]
    low = (np.uint32(1) << np.uint32(mantissa)) - np.uint32(1)
    top = np.uint32(words.itemsize * 8 - 1)
    m = np.uint32(mantissa)
    for i in range(words.shape[0]):
        r = np.uint32(rest[i])
        words[i] = (r & low) | (np.uint32(exponents[i]) << m) | ((r >> m) << top)


def split(words: NDArray[Any], mantissa: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Split each float into exponent and rest.

    Args:
        words: ``[count]`` uint16 or uint32, the bits of floats.
        mantissa: Their mantissa bits.

    Returns:
        Exponents, uint8, and ``sign << mantissa | mantissa bits``: uint8 for bfloat16, else in the type of ``words``.
    """
    exponents = np.empty(words.shape, np.uint8)
    rest = np.empty(words.shape, np.uint8 if mantissa == 7 else words.dtype)
    _split(words, mantissa, exponents, rest)
    return exponents, rest


def join(
    exponents: NDArray[np.uint8], rest: NDArray[Any], mantissa: int, dtype: Any
) -> NDArray[Any]:
    """Undo `split`, to words of the given type."""
    words = np.empty(exponents.shape, dtype)
    _join(exponents, rest, mantissa, words)
    return words
