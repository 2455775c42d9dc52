"""How long the deciding pod waits for what another was handed."""

import time
from dataclasses import dataclass, field, replace
from typing import Final, Self

LEAST_S: Final = 10.0
USUAL: Final = 3.0
"""Times the longest of one's own trials: a helper that takes longer is gone, or has not started."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Ends some time after one's own last trial.

    Attributes:
        longest_s: Longest of one's own trials.
        since_s: When the last one ended, on the monotonic clock.
    """

    longest_s: float = 0.0
    since_s: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Others had time enough."""
        return time.monotonic() - self.since_s >= max(LEAST_S, USUAL * self.longest_s)

    def after(self, duration_s: float) -> Self:
        """Return the patience after a trial of one's own."""
        return replace(self, longest_s=max(self.longest_s, duration_s), since_s=time.monotonic())
