"""Rotary position embedding as a bundle describes it: enough to undo and redo it on keys of a cache."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError
from kvserve_api.fields import Fields


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """How one layer rotates its keys, after Su et al. 2021 (RoFormer).

    The pair ``i`` of a head at position ``p``, the token's index in its request, turns by the angle
    ``p * inv_freq[i]`` and is then multiplied by ``attention_factor``. A pair is the dimensions ``i`` and
    ``i + rotary_dim / 2`` (halves, as GPT-NeoX), or ``2i`` and ``2i + 1`` (interleaved, as GPT-J).

    Attributes:
        inv_freq: Radians a token turns each pair, ``[rotary_dim / 2]`` float64, read-only; a scaling of the context
            is in it.
        attention_factor: What the rotated dimensions are multiplied by; 1 but for YaRN and LongRoPE.
        interleaved: Whether pairs are neighbours.
    """

    inv_freq: NDArray[np.float64]
    attention_factor: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        own = np.array(self.inv_freq, np.float64)
        own.flags.writeable = False
        object.__setattr__(self, "inv_freq", own)
        if own.ndim != 1 or not own.size:
            raise ArtifactError("inv_freq", "must be a list of at least one frequency")
        if not (np.isfinite(own) & (own >= 0)).all():
            raise ArtifactError("inv_freq", "must be finite and not negative")
        if not 0 < self.attention_factor < float("inf"):
            raise ArtifactError(
                "attention_factor", f"must be finite and positive, got {self.attention_factor}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rope) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def rotary_dim(self) -> int:
        """The first so many dimensions of a head are rotated, the others are left as they are."""
        return 2 * len(self.inv_freq)

    def to_json(self) -> dict[str, Any]:
        """Return it as an object; floats keep every bit."""
        return {
            "inv_freq": self.inv_freq.tolist(),
            "attention_factor": float(self.attention_factor),
            "interleaved": self.interleaved,
        }

    @classmethod
    def from_json(cls, fields: Fields, head_dim: int) -> Self:
        """Read it.

        Raises:
            ArtifactError: It is not of this form, or rotates more than ``head_dim`` dimensions.
        """
        numbers = fields.items("inv_freq", max_items=head_dim // 2)
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise fields.fail("inv_freq", "must hold numbers only")
        try:
            rope = cls(
                np.array([float(n) for n in numbers], np.float64),
                fields.number("attention_factor"),
                fields.boolean("interleaved"),
            )
        except OverflowError as error:
            raise fields.fail("inv_freq", f"is no list of frequencies: {error}") from error
        fields.done()
        return rope

    def _key(self) -> tuple[bytes, float, bool]:
        return self.inv_freq.tobytes(), self.attention_factor, self.interleaved
