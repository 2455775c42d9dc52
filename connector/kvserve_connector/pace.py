"""How fast this engine's prefills have gone lately, and so how long the ones that are running may still take."""

from collections import deque
from typing import Final

KEPT: Final = 8
"""So many of the latest prefills count: a load that has ended is soon forgotten."""


class Pace:
    """Seconds a token of the latest prefills; changed and read under its owner's lock or by one thread.

    The fastest of them tells what is left of one that runs: others that the engine computes beside it may only make it
    slower, and what a transfer is believed to be hidden behind must be there.
    """

    def __init__(self) -> None:
        self._seconds_per_token: deque[float] = deque(maxlen=KEPT)

    def add(self, tokens: int, seconds: float) -> None:
        """Take note of a prefill, or of what was followed of it; nothing is learnt from none.

        Args:
            tokens: Tokens that were computed meanwhile.
            seconds: What they took.
        """
        if tokens > 0 and seconds > 0:
            self._seconds_per_token.append(seconds / tokens)

    def left_s(self, tokens: int, spent_s: float) -> float:
        """Return how many seconds a running prefill takes at least, as far as is known; 0 if nothing is.

        Args:
            tokens: Tokens that it had to compute when it was first seen.
            spent_s: Seconds since then.
        """
        if not self._seconds_per_token:
            return 0.0
        return max(0.0, min(self._seconds_per_token) * tokens - spent_s)
