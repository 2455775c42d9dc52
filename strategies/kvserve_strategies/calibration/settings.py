"""How to calibrate: which bases, from how much of which windows of text."""

from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_strategies.bundle import BasisKey
from kvserve_strategies.bundle.basis import CENTRED

QUERY: Final = "query"
FISHER: Final = "fisher"
DEFAULT_KEYS: Final = (
    BasisKey(FISHER, "kv", 1, 1),
    BasisKey(FISHER, "kv", 1, 0),
    BasisKey(FISHER, "kv", 3, 0),
    BasisKey(FISHER, "kv", 10, 0),
    BasisKey(CENTRED, "k", 3, 0),
    BasisKey(CENTRED, "v", 3, 0),
)
_PREFIX_TOKENS: Final = 1024
_CONTINUATION_TOKENS: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to calibrate.

    Attributes:
        keys: The bases to make.
        seed: Of everything random.
        prefix_tokens: Tokens of a window whose cache is looked at.
        continuation_tokens: Tokens after them, whose prediction errors in the cache spoil.
        sinks: First tokens of a text that are left out: attention rests on them, their keys and values are like no
            other's, and strategies keep them apart.
        samples: Continuations drawn of each window.
        kept: Tokens kept of each window to learn which tokens matter.
        recent: Last tokens that are among those kept.
        shrinkage: Share of the identity that is mixed into the Fisher metric.
    """

    keys: tuple[BasisKey, ...] = DEFAULT_KEYS
    seed: int = 0
    prefix_tokens: int = _PREFIX_TOKENS
    continuation_tokens: int = _CONTINUATION_TOKENS
    sinks: int = 4
    samples: int = 2
    kept: int = 256
    recent: int = 32
    shrinkage: float = 0.02

    @classmethod
    def fitting(
        cls, max_positions: int | None, *, keys: tuple[BasisKey, ...], seed: int = 0
    ) -> Self:
        """Return the defaults, with windows that a model of so many positions can read."""
        whole = _PREFIX_TOKENS + _CONTINUATION_TOKENS
        limit = min(max_positions or whole, whole)
        continuation = limit * _CONTINUATION_TOKENS // whole
        return cls(
            keys=keys,
            seed=seed,
            prefix_tokens=limit - continuation,
            continuation_tokens=continuation,
        )

    def __post_init__(self) -> None:
        for name, minimum in (("samples", 1), ("continuation_tokens", 1), ("recent", 1)):
            if getattr(self, name) < minimum:
                raise SpecError(name, f"must be at least {minimum}, got {getattr(self, name)}")
        if self.prefix_tokens <= self.sinks + 1:
            raise SpecError("prefix_tokens", f"must be more than {self.sinks + 1}")
        for key in self.keys:
            if key.space not in (CENTRED, QUERY, FISHER):
                raise SpecError("keys", f"no metric is named {key.space!r}")

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.prefix_tokens + self.continuation_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the settings as an object."""
        return {
            "keys": [str(key) for key in self.keys],
            "prefix_tokens": self.prefix_tokens,
            "continuation_tokens": self.continuation_tokens,
            "sinks": self.sinks,
            "samples": self.samples,
            "kept": self.kept,
            "recent": self.recent,
            "shrinkage": self.shrinkage,
        }
