"""The way to a store, as its answers show it: goodput, round trip, and what is asked of it now."""

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from kvserve_api.latency import Link, StageCost, predict
from kvserve_connector.selector import DEFAULT_BYTES_PER_S

BUSY_MEMORY_S: Final = 5.0
"""What was measured counts with a weight that falls by a factor e in so many seconds of fetching."""
MEMORY_SPANS: Final = 3.0
"""And in so many spans in which something was under way, a prefix or two: over a link that has become fast, seconds of
fetching are hundreds of prefixes, which would be stored and chosen for the link as it was."""
FRESH_S: Final = 30.0
"""After so long without a value the goodput may have changed; it is hoped to double each time this passes again."""
PRIOR_RTT_S: Final = 1e-3
PRIOR_DECODE: Final = StageCost(bytes_per_s=1e9)
_BLEND: Final = 0.2


@dataclass(slots=True)
class _Coded:
    """What values of one rate were like: native and stored bytes, seconds of decoding."""

    native_bytes: float = 0.0
    wire_bytes: float = 0.0
    decode_s: float = 0.0
    last_s: float = -math.inf


class StoreLink:
    """What is known of the way from a store to this pod; safe from any thread.

    Seconds count while at least one value is under way, so that values fetched side by side are not taken for slow.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since_s = 0.0
        self._new_span = False
        self._bytes = 0.0
        self._busy_s = 0.0
        self._last_s = -math.inf
        self._rtt_s: float | None = None
        self._promised_bytes = 0.0
        self._coded: dict[Hashable, _Coded] = {}

    def begin(self, now_s: float) -> None:
        """Take note of a value that is asked for."""
        with self._lock:
            if not self._under_way:
                self._since_s = now_s
                self._new_span = True
            self._under_way += 1

    def end(self, now_s: float, nbytes: int) -> None:
        """Take note of its arrival; 0 bytes if there was none."""
        with self._lock:
            self._under_way -= 1
            taken_s = max(0.0, now_s - self._since_s)
            self._since_s = now_s
            self._fade(taken_s / BUSY_MEMORY_S)
            if nbytes and self._new_span:
                # what does not come says nothing new of the rate
                self._fade(1 / MEMORY_SPANS)
                self._new_span = False
            self._bytes += nbytes
            self._busy_s += taken_s
            if nbytes:
                self._last_s = now_s

    def asked(self, seconds: float) -> None:
        """Take note of how long a small question took."""
        with self._lock:
            old_s = seconds if self._rtt_s is None else self._rtt_s
            self._rtt_s = old_s + _BLEND * (seconds - old_s)

    def decoded(
        self, now_s: float, rate: Hashable, native_bytes: int, wire_bytes: int, decode_s: float
    ) -> None:
        """Take note of a value that was decoded."""
        with self._lock:
            coded = self._coded.setdefault(rate, _Coded())
            coded.last_s = now_s
            for name, add in (
                ("native_bytes", native_bytes),
                ("wire_bytes", wire_bytes),
                ("decode_s", decode_s),
            ):
                setattr(coded, name, getattr(coded, name) * (1 - _BLEND / 4) + add)

    def promise(self, wire_bytes: float) -> None:
        """Take note of bytes that will be fetched (positive), or are, or will not be (negative)."""
        with self._lock:
            self._promised_bytes = max(0.0, self._promised_bytes + wire_bytes)

    def goodput(self, now_s: float) -> tuple[float, bool]:
        """Return bytes a second, and whether that was measured lately."""
        with self._lock:
            if not (self._bytes and self._busy_s):
                return DEFAULT_BYTES_PER_S, False
            measured = self._bytes / self._busy_s
            age_s = now_s - self._last_s
        return _hoped(measured, DEFAULT_BYTES_PER_S, age_s), age_s <= FRESH_S

    def snapshot(self, now_s: float) -> Link:
        """Return the link as a transfer sees it now."""
        goodput = self.goodput(now_s)[0]
        with self._lock:
            rtt_s = PRIOR_RTT_S if self._rtt_s is None else self._rtt_s
            return Link(bytes_per_s=goodput, backlog_bytes=self._promised_bytes, rtt_s=rtt_s)

    def _fade(self, times: float) -> None:
        """Let what was measured weigh less by e to this power."""
        fade = math.exp(-times)
        self._bytes *= fade
        self._busy_s *= fade

    def ratio(self, rate: Hashable, prior: float) -> float:
        """Return native bytes for each stored one."""
        with self._lock:
            coded = self._coded.get(rate)
            return coded.native_bytes / coded.wire_bytes if coded and coded.wire_bytes else prior

    def decode(self, now_s: float, rate: Hashable, prior: StageCost) -> StageCost:
        """Return the cost of decoding; what nobody decoded lately is hoped to be faster, like the goodput."""
        with self._lock:
            coded = self._coded.get(rate)
            if not (coded and coded.decode_s > 0):
                return prior
            measured, last_s = coded.native_bytes / coded.decode_s, coded.last_s
        hoped = _hoped(measured, prior.bytes_per_s, now_s - last_s)
        return StageCost(bytes_per_s=max(1.0, hoped))


def _hoped(measured: float, prior: float, age_s: float) -> float:
    """Return a measured speed, doubled again and again with age, up to what is believed before anything is measured."""
    doublings = min(60.0, max(0.0, age_s / FRESH_S - 1))
    return min(max(measured, prior), measured * math.exp2(doublings))


def fetch_s(link: Link, parts: Sequence[tuple[float, float, StageCost]]) -> float:
    """Return what it takes to fetch a prefix, in seconds; nothing is encoded.

    Args:
        link: The way to the store.
        parts: For each value native bytes, ratio and cost of decoding; at least one.
    """
    native_bytes = sum(part[0] for part in parts)
    wire_bytes = sum(native / ratio for native, ratio, _ in parts)
    decode_s = sum(cost.seconds(native) for native, _, cost in parts)
    return predict(
        native_bytes=native_bytes,
        ratio=native_bytes / wire_bytes,
        encode=StageCost(),
        decode=StageCost(floor_s=decode_s),
        link=link,
        chunks=len(parts),
    ).total_s
