"""Reading of arrays one after the other from a section, none of whose bytes can be trusted."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import WireError, WireReason
from kvserve_strategies.stage import Bytes


@dataclass(slots=True)
class Reader:
    """Takes bytes from a section, never more than there are.

    Attributes:
        data: The section.
        what: What it is, for errors.
        at: Where to go on.
    """

    data: Bytes
    what: str
    at: int = 0

    def take(self, size: int) -> Bytes:
        """Return the next bytes, not copied."""
        if size > self.data.size - self.at:
            raise self.malformed(f"{size} bytes wanted, {self.data.size - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def bytes(self, size: int) -> bytes:
        """Return the next bytes."""
        return self.take(size).tobytes()

    def array(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the next numbers, not copied."""
        return self.take(count * dtype.itemsize).view(dtype)

    def align(self, size: int) -> None:
        """Skip zeros up to a multiple of ``size`` from the start."""
        if self.take(-self.at % size).any():
            raise self.malformed("padding is not zero")

    def done(self) -> None:
        """Refuse bytes after the last."""
        if self.at != self.data.size:
            raise self.malformed(f"{self.data.size - self.at} bytes too many")

    def malformed(self, detail: str) -> WireError:
        """Return the error for a section that no encoder writes."""
        return WireError(WireReason.MALFORMED, f"{self.what}: {detail}")
