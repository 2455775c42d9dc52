"""The ladder's tables, read from the data file."""

import json
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.rans.models import Model
from kvserve_kernels.rans.values import Tables

FILE: Final = Path(__file__).parent / "tables.json"
# what another table than that of the next channel costs to name, in 1/1024 bits
KEEP: Final = 6 * 1024


@cache
def tables() -> Tables:
    """Return the tables; number 0 is for channels of zeros, the others widen."""
    return Tables.of(
        [
            Model(
                base=entry["base"],
                low_bits=entry["low_bits"],
                escape=len(entry["frequencies"]) > 1,
                frequencies=tuple(entry["frequencies"]),
            )
            for entry in json.loads(FILE.read_text())
        ]
    )


@cache
def prices() -> NDArray[np.int32]:
    """Return ``[tables, bins]``: the mean code length of the magnitudes of a bin, in 1/1024 bits."""
    return np.array([entry["prices"] for entry in json.loads(FILE.read_text())], np.int32)
