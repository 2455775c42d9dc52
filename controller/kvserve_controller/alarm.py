"""A timer that is cheap to set again and again."""

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """Calls back after a time, or earlier: it is moved only to go off sooner, which nearly no wait needs.

    A thousand streams wait again and again: `asyncio.timeout` would set and cancel a timer each time.
    """

    def __init__(self, ring: Callable[[], object]) -> None:
        """Make one for the running loop that calls ``ring``."""
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = math.inf

    def set(self, delay_s: float | None) -> None:
        """Have it go off in so many seconds at the latest; None for whenever it was to."""
        due_s = math.inf if delay_s is None else self._loop.time() + delay_s
        if due_s < self._due_s:
            self.stop()
            self._due_s = due_s
            self._timer = self._loop.call_at(due_s, self._go_off)

    def stop(self) -> None:
        """Have it not go off."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due_s = None, math.inf

    def _go_off(self) -> None:
        self._timer, self._due_s = None, math.inf
        self._ring()
