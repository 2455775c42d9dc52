"""What the real connector would know of a replayed link.

The connector's own `LinkState` runs here, on a clock of the replay and on sockets whose ``TCP_INFO`` is computed from what
the replayed link carried: bytes acknowledged, and the time in which something was waiting to be.
"""

import heapq
import struct
from collections.abc import Callable
from typing import Any, Final, cast

from controller_queue import Sent
from kvserve_api.latency import Link
from kvserve_connector.links import LinkState

INFO_BYTES: Final = 192
ACKED_AT: Final = 120
MIN_RTT_AT: Final = 148
RATE_AT: Final = 160
"""Offsets in the kernel's ``struct tcp_info``."""


class Account:
    """Stands for the socket of one transfer: answers ``getsockopt(TCP_INFO)`` as the kernel would at that time."""

    def __init__(self, sent: Sent, rtt_s: float, now_s: Callable[[], float]) -> None:
        self._sent = sent
        self._rtt_s = rtt_s
        self._now_s = now_s
        self._whole = 0
        self._busy_s = 0.0
        self._busy_until_s = -1.0

    def getsockopt(self, _level: int, _option: int, _size: int) -> bytes:
        """Return a ``struct tcp_info``."""
        acked, busy_s, rate = self.progress(self._now_s())
        info = bytearray(INFO_BYTES)
        struct.pack_into("<Q", info, ACKED_AT, int(acked))
        struct.pack_into("<I", info, MIN_RTT_AT, int(self._rtt_s * 1e6))
        # the kernel counts busy time in ticks, here of a millisecond
        struct.pack_into("<3Q", info, RATE_AT, int(rate), int(busy_s * 1e3) * 1000, 0)
        return bytes(info)

    def progress(self, now_s: float) -> tuple[float, float, float]:
        """Return bytes acknowledged, busy seconds, and the rate of the latest chunk; times never go back."""
        chunks, each = self._sent.link, self._sent.work.wire_bytes / self._sent.work.chunks
        while self._whole < len(chunks) and chunks[self._whole][2] <= now_s:
            reached_s, _, end_s = chunks[self._whole]
            self._busy_s += end_s - max(reached_s, self._busy_until_s)
            self._busy_until_s = end_s
            self._whole += 1
        acked, busy_s, rate = self._whole * each, self._busy_s, 0.0
        if self._whole > 0:
            _, start_s, end_s = chunks[self._whole - 1]
            rate = each / max(end_s - start_s, 1e-9)
        if self._whole < len(chunks) and chunks[self._whole][0] < now_s:
            reached_s, start_s, end_s = chunks[self._whole]
            busy_s += now_s - max(reached_s, self._busy_until_s)
            if start_s < now_s:
                acked += each * (now_s - start_s) / (end_s - start_s)
        return acked, busy_s, rate


class WatchedLink:
    """The connector's knowledge of one link, brought up to date as the replay's time passes."""

    def __init__(self, rtt_s: float) -> None:
        self.now_s = 0.0
        self.state = LinkState(lambda: self.now_s)
        self._rtt_s = rtt_s
        self._open: list[tuple[Sent, Any, float, int]] = []
        self._events: list[tuple[float, int, bool, Any, float]] = []
        self._count = 0

    def promise(self, sent: Sent, promised_bytes: float) -> None:
        """Take note of a transfer that begins now."""
        self.now_s = sent.at_s
        self.state.queue(promised_bytes)
        # stands for a socket in all that the link asks of one
        account: Any = cast("Any", Account(sent, self._rtt_s, lambda: self.now_s))
        self.state.attach(account)
        self._open.append((sent, account, promised_bytes, 0))

    def until(self, now_s: float) -> None:
        """Let the connector look at its sockets as it would have done until now."""
        still: list[tuple[Sent, Any, float, int]] = []
        for sent, account, promised, seen in self._open:
            chunks = sent.link
            for number in range(seen, len(chunks)):
                self._count += 1
                last = number + 1 == sent.work.chunks
                event = (chunks[number][2], self._count, last, account, promised / sent.work.chunks)
                heapq.heappush(self._events, event)
            if len(chunks) < sent.work.chunks:
                still.append((sent, account, promised, len(chunks)))
        self._open = still
        while self._events and self._events[0][0] <= now_s:
            self.now_s, _, last, account, promised = heapq.heappop(self._events)
            self.state.sample(account)
            self.state.queue(-promised)
            if last:
                self.state.detach(account)
        self.now_s = now_s

    def link(self, prior_bytes_per_s: float) -> Link:
        """Return what is known now."""
        return self.state.snapshot(prior_bytes_per_s)
