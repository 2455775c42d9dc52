"""Magnitudes that the encoder counts to choose a channel's table."""

from typing import Final

# the least magnitude of each bin; fine where most values are. rans.h has the same
LEAST: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)


def shift_of(tokens: int) -> int:
    """Return by how many bits counts are shortened: to 15, so that sums of costs fit 32."""
    shift = 0
    while -(-tokens >> shift) > 0x7FFF:
        shift += 1
    return shift
