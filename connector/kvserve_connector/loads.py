"""What a link or a coder was asked for lately, from the arrivals themselves, and what it was promised."""

import math
import threading
from typing import Final

from kvserve_api.latency import NO_LOAD, Load
from kvserve_api.profile_set import NONE
from kvserve_api.table import Candidate, DecisionTable

MEMORY_S: Final = 15.0
"""Arrivals count with a weight that falls by a factor e in so many seconds."""
LEAST_ARRIVALS: Final = 2.0
"""Fewer remembered arrivals than that are no load, only an event."""
RESOLUTION_S: Final = 1e-3
"""Added to both times of a whole transfer before they are compared: less than that is measured of schedulers."""
USUAL_BYTES: Final = 64 << 20
"""Native bytes of a transfer by which tables are compared."""
FACTOR_MEMORY: Final = 2.0
"""Transfers after which the factor has gone most of the way to what is seen."""
MOST_STEP: Final = math.log(2.0)
"""Within one transfer the factor changes by two at most."""
MOST_RESIDUAL: Final = math.log(20.0)
CREDIT_TRANSFERS: Final = 50.0
"""Credit for trying out that is not used is kept up to that of so many transfers, and given at the start."""
EVERY: Final = 4
"""One of so many transfers may try something out."""
TINY_S: Final = 1e-6
"""What is left of sums and differences of promises is nothing."""


def delays(requests: int, processors: float) -> float:
    """Return how many requests of an engine a second of a coding thread delays by a second.

    The thread competes with one of the engine's on each processor, so the engine loses its fair share, and each request
    that is computed or waits for that by as much.

    Args:
        requests: What the engine computes or has waiting.
        processors: That both run on.
    """
    return requests / (processors + 1)


class Arrivals:
    """Exponentially weighted arrivals; safe from any thread.

    Args:
        now_s: When counting begins, on the clock of the other calls.
        memory_s: Time constant, in seconds.
    """

    def __init__(self, now_s: float, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._lock = threading.Lock()
        # when, how many, how many bytes; replaced as one, so that whoever only reads needs no lock
        self._known = (now_s, 0.0, 0.0)

    def load(self, now_s: float, share: float = 1.0) -> Load:
        """Return what was asked for lately.

        Args:
            now_s: The time.
            share: The part of it that falls to one of several coders that work side by side.
        """
        at_s, count, native_bytes = self._known
        memory_s = self._memory_s
        fade = math.exp((at_s - now_s) / memory_s) if now_s > at_s else 1.0
        if count * fade < LEAST_ARRIVALS:
            return NO_LOAD
        scale = fade * share / memory_s
        # what `Load(...)` would make in five times the time: a choice waits for two
        load = object.__new__(Load)
        load.arrivals_per_s, load.native_bytes_per_s = count * scale, native_bytes * scale
        return load

    def add(self, now_s: float, native_bytes: int) -> None:
        """Count a transfer."""
        with self._lock:
            at_s, count, known_bytes = self._known
            fade = math.exp(-max(0.0, now_s - at_s) / self._memory_s)
            self._known = (max(now_s, at_s), count * fade + 1, known_bytes * fade + native_bytes)


class Coders:
    """The threads of one producer that encode: how much was promised of them, and how often they are asked.

    They also see at once when they become slower than the table in force has it, long before the controller does.

    Args:
        threads: How many code side by side.
        now_s: When counting begins, on the clock of the other calls.

    Attributes:
        delays: How many requests of the engine a second of encoding delays by a second now.
        factor: By how much encoding takes longer now than the table in force says.
        share: The part of all encoding that falls to one thread.
    """

    def __init__(self, threads: int, now_s: float) -> None:
        self.share = 1 / threads
        self.arrivals = Arrivals(now_s)
        self._lock = threading.Lock()
        self._promised_s = 0.0
        self._residual = 0.0
        self._table: DecisionTable | None = None
        self.delays = 0.0
        self.factor = 1.0

    def observe(self, encode_s: float, expected_s: float, share: float) -> None:
        """Compare what a part of a transfer took with what the table in force says of it.

        Args:
            encode_s: What the part took.
            expected_s: What the table says of the whole transfer.
            share: The part.
        """
        if not (encode_s >= 0 and expected_s >= 0):
            return
        residual = math.log((encode_s / share + RESOLUTION_S) / (expected_s + RESOLUTION_S))
        with self._lock:
            step = (1 - math.exp(-share / FACTOR_MEMORY)) * (residual - self._residual)
            # a single slow piece must not rule, three slow transfers may
            step = max(-share * MOST_STEP, min(share * MOST_STEP, step))
            self._correct(self._residual + step)

    def follow(self, table: DecisionTable | None) -> None:
        """Take note of the table in force: what it says more or less than the last one needs no factor any more."""
        with self._lock:
            before, self._table = self._table, table
            if before is table:
                return
            if before is None or table is None:
                self._correct(0.0)
                return
            changes = [
                math.log((_usual_s(new) + RESOLUTION_S) / (_usual_s(old) + RESOLUTION_S))
                for name, new in table.candidates.items()
                if name != NONE and (old := before.candidates.get(name)) is not None
            ]
            if changes:
                self._correct(self._residual - sum(changes) / len(changes))

    @property
    def backlog_s(self) -> float:
        """Seconds until what was promised is encoded, as fast as it goes now."""
        return self._promised_s * self.share * self.factor if self._promised_s >= TINY_S else 0.0

    def promise(self, encode_s: float) -> None:
        """Take note of encoding that was promised (positive) or is done (negative), in seconds of one thread."""
        with self._lock:
            self._promised_s += encode_s

    def _correct(self, residual: float) -> None:
        self._residual = max(-MOST_RESIDUAL, min(MOST_RESIDUAL, residual))
        self.factor = math.exp(self._residual)


def _usual_s(candidate: Candidate) -> float:
    return candidate.encode.seconds(USUAL_BYTES)


class Credit:
    """What trying out may cost, for one workload class: a share of the transfers' time, saved up within a limit."""

    def __init__(self) -> None:
        self._credit_s = math.inf
        self._turn = 0

    def allowance_s(self) -> float:
        """Return what the next transfer may cost more than the best, in seconds."""
        self._turn += 1
        return self._credit_s if self._turn % EVERY == 0 else 0.0

    def settle(self, predicted_s: float, extra_s: float, share: float) -> None:
        """Take note of a transfer.

        Args:
            predicted_s: Its time.
            extra_s: How much of that is the expected cost of trying something out.
            share: Of the time without it, which is added to the credit.
        """
        earned_s = share * (predicted_s - extra_s) if predicted_s > extra_s else 0.0
        credit_s, most_s = self._credit_s + earned_s, CREDIT_TRANSFERS * earned_s
        self._credit_s = (credit_s if credit_s < most_s else most_s) - extra_s
