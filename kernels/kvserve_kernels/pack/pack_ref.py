"""The definition of packing, bit by bit."""

import numpy as np
from numpy.typing import NDArray


def pack(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Put bit b of code i at bit ``i * width + b``, least bit first."""
    bits = (codes[:, None] >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack(data: NDArray[np.uint8], count: int, width: int) -> NDArray[np.uint8]:
    """Undo `pack`."""
    bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    codes: NDArray[np.uint8] = (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return codes
