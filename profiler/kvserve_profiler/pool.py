"""What a search knows: the candidates with their cheap objectives, and what was observed of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvserve_api.errors import SpecError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pool:
    """The candidates of a search; n of them.

    Attributes:
        features: ``[n, features]``, finite: what a strategy is, a column a property. Values of one column that are
            close should mean strategies that lose alike; a choice without an order takes a column for each value.
        ratio: ``[n]``, positive: native bytes over wire bytes.
        codec_s: ``[n]``, positive: seconds to encode and decode a transfer.
        forecast: ``[n, texts, 2]``, not negative: what is known beforehand of the loss on each text, in basis points,
            directed and scattered (`kvserve_profiler.sensitivity`); None if nothing is.
        starts: ``[n]`` bool: those to begin with, because they are known to be sensible; None for all alike.
    """

    features: FloatArray
    ratio: FloatArray
    codec_s: FloatArray
    forecast: FloatArray | None = None
    starts: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        for name in ("features", "ratio", "codec_s"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, values)
            if values.ndim != (2 if name == "features" else 1) or len(values) != len(self.ratio):
                raise SpecError(name, f"has the shape {values.shape}, for {len(self.ratio)} ratios")
            if not np.isfinite(values).all() or (name != "features" and not (values > 0).all()):
                raise SpecError(name, "must be finite, and ratios and times positive")

    def __len__(self) -> int:
        return len(self.ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What was observed of one candidate.

    Attributes:
        index: Of the candidate in the pool.
        losses_bp: For each text, the loss on each of its windows so far, in basis points; windows come in one order
            for all candidates, so that candidates are compared on the same ones. Not finite, or none, if it failed.
    """

    index: int
    losses_bp: Sequence[Sequence[float]]

    @property
    def failed(self) -> bool:
        """Whether it gave no usable loss on some text."""
        return not self.losses_bp or not all(
            len(losses) > 0 and np.isfinite(losses).all() for losses in self.losses_bp
        )


def windows_of(losses_bp: Sequence[Sequence[float]]) -> FloatArray:
    """Return the losses of the candidates that were observed on all windows.

    Args:
        losses_bp: For each candidate those on its windows.

    Returns:
        ``[candidates, windows]``; ``[0, 0]`` if none was observed.
    """
    most = max((len(row) for row in losses_bp), default=0)
    rows = [row for row in losses_bp if len(row) == most]
    return np.array(rows, dtype=np.float64).reshape(len(rows), most)
