"""What the real connector would know of a replayed link.

The connector's own `LinkState` runs here, on a clock of the replay and on sockets whose ``TCP_INFO`` is computed from
what the replayed link carried: bytes acknowledged, and the time in which something was waiting to be.
"""

import heapq
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from controller_queue import Sent, Work
from controller_replay import Queues
from kvserve_api.latency import Link, StageCost
from kvserve_connector.links import LinkState
from kvserve_connector.loads import Coders
from kvserve_connector.probing import FIRST_BYTES, PROBE_BYTES, goes_on
from kvserve_connector.promises import Promise

INFO_BYTES: Final = 192
ACKED_AT: Final = 120
MIN_RTT_AT: Final = 148
RATE_AT: Final = 160
"""Offsets in the kernel's ``struct tcp_info``."""
FREE: Final = StageCost()


class Account:
    """Stands for the socket of one transfer: answers ``getsockopt(TCP_INFO)`` as the kernel would at that time.

    Args:
        sent: What becomes of it.
        rtt_s: Of the link.
        now_s: The time.
        nbytes: Returns the wire bytes of a chunk by its place in `Sent.link`; without, all are equal.
    """

    def __init__(
        self,
        sent: Sent,
        rtt_s: float,
        now_s: Callable[[], float],
        nbytes: Callable[[int], float] | None = None,
    ) -> None:
        self._sent = sent
        self._nbytes = nbytes or (lambda _: sent.work.wire_bytes / sent.work.chunks)
        self._rtt_s = rtt_s
        self._now_s = now_s
        self._whole = 0
        self._whole_bytes = 0.0
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
        chunks = self._sent.link
        while self._whole < len(chunks) and chunks[self._whole][2] <= now_s:
            reached_s, _, end_s = chunks[self._whole]
            self._busy_s += end_s - max(reached_s, self._busy_until_s)
            self._busy_until_s = end_s
            self._whole_bytes += self._nbytes(self._whole)
            self._whole += 1
        acked, busy_s, rate = self._whole_bytes, self._busy_s, 0.0
        if self._whole > 0:
            _, start_s, end_s = chunks[self._whole - 1]
            rate = self._nbytes(self._whole - 1) / max(end_s - start_s, 1e-9)
        if self._whole < len(chunks) and chunks[self._whole][0] < now_s:
            reached_s, start_s, end_s = chunks[self._whole]
            busy_s += now_s - max(reached_s, self._busy_until_s)
            if start_s < now_s:
                acked += self._nbytes(self._whole) * (now_s - start_s) / (end_s - start_s)
        return acked, busy_s, rate


class WatchedLink:
    """The connector's knowledge of one link and of its coder, brought up to date as the replay's time passes.

    Attributes:
        now_s: The time.
        state: The connector's own account of the link.
        coders: Its account of the producer's one coder.
        ended: Takes the native bytes of each transfer when its last chunk has been sent.
    """

    def __init__(self, rtt_s: float) -> None:
        self.now_s = 0.0
        self.state = LinkState(lambda: self.now_s)
        self.coders = Coders(1, 0.0)
        self._rtt_s = rtt_s
        self._open: list[_Transfer] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.ended: Callable[[int], None] = lambda native_bytes: None

    def promise(
        self,
        sent: Sent,
        wire_bytes: float,
        encode: StageCost = FREE,
        decode: StageCost = FREE,
        native_bytes: int = 0,
    ) -> None:
        """Take note of a transfer that begins now.

        Args:
            sent: What truly becomes of it.
            wire_bytes: What is expected of it.
            encode: The cost to expect of encoding; free is never observed.
            decode: The cost to expect of decoding.
            native_bytes: Its native bytes.
        """
        self.now_s = sent.at_s
        promise = Promise(
            link=self.state,
            coders=self.coders,
            wire_bytes=wire_bytes,
            encode_s=0.0 if encode is FREE else encode.seconds(native_bytes),
            decode_s=0.0 if decode is FREE else decode.seconds(native_bytes),
        )
        promise.make()
        # stands for a socket in all that the link asks of one
        account: Any = Account(sent, self._rtt_s, lambda: self.now_s)
        self.state.attach(account)
        self._open.append(
            _Transfer(
                sent, account, promise, observed=encode is not FREE, native_bytes=native_bytes
            )
        )

    def until(self, now_s: float) -> None:
        """Let the connector look at its sockets as it would have done until now."""
        for transfer in self._open:
            chunks = transfer.sent.link
            for coded_s, _, sent_s in chunks[transfer.seen :]:
                self._at(coded_s, partial(self._coded, transfer))
                self._at(sent_s, partial(self._went, transfer))
            transfer.seen = len(chunks)
        self._open = [one for one in self._open if one.seen < one.sent.work.chunks]
        while self._events and self._events[0][0] <= now_s:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        self.now_s = now_s

    def probe(self, queues: Queues) -> None:
        """Do what the connector does when a consumer asks for a probe; what comes next waits for it on the link."""
        start_s = max(self.now_s + self._rtt_s, queues.link_free_s)
        nbytes, end_s = FIRST_BYTES, queues.capacity.finish_s(start_s, FIRST_BYTES)
        if goes_on(end_s - start_s, self.state.goodput_bytes_per_s or 0.0):
            nbytes, end_s = PROBE_BYTES, queues.capacity.finish_s(start_s, PROBE_BYTES)
        queues.link_free_s = end_s
        sent = Sent(start_s, Work(0.0, nbytes, 0.0, 1), [(start_s, start_s, end_s)])
        account: Any = Account(sent, self._rtt_s, lambda: self.now_s)
        self.state.attach(account)

        def end() -> None:
            self.state.detach(account)
            self.state.end_probe(end_s - start_s)

        self._at(end_s, end)

    def link(self, prior_bytes_per_s: float) -> Link:
        """Return what is known now."""
        return self.state.snapshot(prior_bytes_per_s, self.coders)

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, happen))

    def _coded(self, transfer: "_Transfer") -> None:
        """Do what the connector does when a chunk was coded."""
        share = 1 / transfer.sent.work.chunks
        transfer.promise.coded(share)
        if transfer.observed:
            encode_s = transfer.sent.work.encode_s * share
            self.coders.observe(encode_s, transfer.promise.encode_s, share)

    def _went(self, transfer: "_Transfer") -> None:
        """Do what the connector's server does when a chunk was sent."""
        transfer.gone += 1
        self.state.sample(transfer.account)
        transfer.promise.keep(1 / transfer.sent.work.chunks)
        if transfer.gone == transfer.sent.work.chunks:
            self.state.detach(transfer.account)
            transfer.promise.end()
            self.ended(transfer.native_bytes)


@dataclass(slots=True, eq=False)
class _Transfer:
    """A transfer under way: so many of its chunks have been seen to reach the link, and so many have been sent."""

    sent: Sent
    account: Any
    promise: Promise
    observed: bool
    native_bytes: int
    seen: int = 0
    gone: int = 0
