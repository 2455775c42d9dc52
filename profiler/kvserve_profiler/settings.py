"""How a run measures. Part of the identity of its trials: other settings give other numbers."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from kvserve_api.errors import SpecError

GRADIENTS: Final = 16
"""Gradients of a window: with fewer the directed forecast is lost in their noise, more take memory and time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a run measures.

    Attributes:
        prefix_tokens: Tokens of each window whose KV cache is compressed.
        continuation_tokens: Tokens after them that are scored with it.
        max_windows: Most windows of a text that a search sees, and most that are held out for its result.
        first_windows: Windows after which a search goes on only with what may still be worth it.
        gradients: By so many gradients of each text's first window the losses of all candidates are forecast; 0 for no
            forecasts.
        block_tokens: Neighbouring tokens that the bootstrap keeps together, because their losses are alike.
        resamples: Bootstrap resamples.
        confidence_percent: Level of the one-sided upper limit of the loss.
        cost_repeats: How often each encode and decode is timed; the least time counts.
        threads: Threads of the model; the codecs are timed on one.
        seed: Of the bootstrap.
    """

    prefix_tokens: int = 768
    continuation_tokens: int = 128
    max_windows: int = 4
    first_windows: int = 1
    gradients: int = GRADIENTS
    block_tokens: int = 32
    resamples: int = 2000
    confidence_percent: float = 95.0
    cost_repeats: int = 5
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (
            ("prefix_tokens", 16),
            ("continuation_tokens", 8),
            ("max_windows", 1),
            ("first_windows", 1),
            ("gradients", 0),
            ("block_tokens", 1),
            ("resamples", 100),
            ("cost_repeats", 1),
            ("threads", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < minimum:
                raise SpecError(name, f"must be at least {minimum}, got {getattr(self, name)}")
        if not 50 <= self.confidence_percent < 100:
            raise SpecError(
                "confidence_percent", f"must be 50 to below 100, got {self.confidence_percent}"
            )

    @property
    def window_tokens(self) -> int:
        """Tokens that one window needs."""
        return self.prefix_tokens + self.continuation_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the settings as an object."""
        return asdict(self)
