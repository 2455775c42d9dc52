"""What a producer knows of the way to each of its consumers: goodput, bytes ahead, round trip.

Goodput comes from the kernel's own account of a connection (``TCP_INFO``): bytes acknowledged over the time in which
something was waiting to be. Unlike clocks around ``send``, that is not fooled by socket buffers, pauses of an encoder
or a process that had to wait for its core.
"""

import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from kvserve_api.latency import NO_LOAD, Link
from kvserve_connector.goodput import Goodput, Sample, blend
from kvserve_connector.loads import TINY_S, Arrivals, Coders
from kvserve_connector.tcp_account import TcpProgress

SAMPLE_BYTES: Final = 1 << 20
"""Within a transfer, a sample is complete with this many acknowledged bytes, or after `SAMPLE_S` of busy time."""
SAMPLE_S: Final = 0.05
TICKS_S: Final = 0.01
"""The kernel counts busy time in ticks of some milliseconds: less than this says nothing of a rate."""
SLACK_S: Final = 0.004
"""What of a chunk's busy time may be a tick, or a core that was busy otherwise, and not the link."""
FAST_BYTES: Final = 256 << 10
"""With as many beyond the bursts, in less than `TICKS_S`, a sample tells how fast a link is at least."""
FORGET_S: Final = 20.0
"""After so long without a sample that surely was the link's, it may be twice as fast as it has shown since then."""
BURST_BYTES: Final = 128 << 10
"""What shapers and switches let pass at once after a pause; it must not make a link look faster than it is."""
SCATTER: Final = 1 / 8
"""So much more than is thought of it, in shares, a link that never rests must show to be thought faster."""
PROBE_SHARE: Final = 0.02
"""Most of a link's time that goes into finding out whether it has become faster."""
UNSURE_S: Final = 0.2
"""After so long without a sample that surely was the link's, only more bytes can show that it has become faster."""
PROBE_EVERY_S: Final = 0.5
"""So long at least passes from one wish to find out to the next."""
MAX_LINKS: Final = 256


class LinkState:
    """One link; safe to use from any thread, no lock is held across I/O.

    Several connections may share a link. Their bytes are added up, and so is their busy time, but no more than really
    passed: two that wait for the link together do not make it look half as fast.

    Args:
        now_s: A clock that never goes back.
        probe_share: Most of the link's time that may go into probes; 0 for none.
    """

    def __init__(
        self, now_s: Callable[[], float] = time.monotonic, probe_share: float = PROBE_SHARE
    ) -> None:
        self._now_s = now_s
        self._probe_share = probe_share
        self._lock = threading.Lock()
        self._goodput: Goodput | None = None
        self._backlog_bytes = 0.0
        self._backlog_s = 0.0
        self._rtt_s = 0.0
        self._accounts: dict[socket.socket, TcpProgress] = {}
        self._acked_bytes = 0
        self._burst_bytes = 0.0
        self._busy_s = 0.0
        self._slack_s = 0.0
        self._delivery_bytes_per_s = 0
        self._best_bytes_per_s = 0.0
        self._since_s = self._sure_s = self._told_s = self._seen_s = now_s()
        self._allowed_bytes = float(BURST_BYTES)
        self._probe_wished = False
        self._next_probe_s = 0.0
        self.arrivals = Arrivals(self._since_s)

    def snapshot(
        self,
        prior_bytes_per_s: float,
        coders: Coders | None = None,
        decode_delays: float = 0.0,
        hidden_s: float = 0.0,
    ) -> Link:
        """Return what is known now.

        Args:
            prior_bytes_per_s: Stands for a goodput that was never measured.
            coders: What encodes here, and the consumer is taken to decode with as many threads; without, nothing is
                said of coders.
            decode_delays: How many requests at the consumer a second of decoding delays by a second.
            hidden_s: Seconds for which the prefill will still go on that is to be sent.
        """
        time_s = self._now_s()
        load = self.arrivals.load(time_s)
        encode_backlog_s, share, factor, encoder_load = 0.0, 1.0, 1.0, NO_LOAD
        encode_delays = 0.0
        if coders is not None:
            encode_backlog_s, share, factor = coders.backlog_s, coders.share, coders.factor
            encoder_load = coders.arrivals.load(time_s, share)
            encode_delays = coders.delays
        with self._lock:
            # a link that became slow in the middle of a transfer is known before the next one chooses
            self._see(time_s)
            self._learn(time_s, final=False)
            goodput, backlog_bytes, backlog_s = self._goodput, self._backlog_bytes, self._backlog_s
            rtt_s = self._rtt_s
        # what `Link(...)` would make in six times the time: nothing of it needs to be checked again
        link = object.__new__(Link)
        link.bytes_per_s = prior_bytes_per_s if goodput is None else goodput.bytes_per_s
        # what is left of sums and differences is nothing
        link.backlog_bytes = backlog_bytes if backlog_bytes >= 1 else 0.0
        link.rtt_s = rtt_s
        link.encode_backlog_s = encode_backlog_s
        link.decode_backlog_s = backlog_s * share if backlog_s >= TINY_S else 0.0
        link.load = load
        link.encoder_load = encoder_load
        link.encode_factor = factor
        link.encode_delays = encode_delays
        link.decode_delays = decode_delays
        link.hidden_s = hidden_s
        return link

    @property
    def goodput_bytes_per_s(self) -> float | None:
        """What was learnt so far, without another look; None before anything was."""
        goodput = self._goodput
        return None if goodput is None else goodput.bytes_per_s

    @property
    def wanted(self) -> bool:
        """Whether something that was promised is still to be sent."""
        return self._backlog_bytes >= 1

    @property
    def unsure(self) -> bool:
        """Whether the link, which rests, may have become faster unseen, and may be probed."""
        time_s = self._now_s()
        return (
            self._probe_share > 0
            and self._goodput is not None
            and not self.wanted
            and time_s - self._told_s > UNSURE_S
            and time_s >= self._next_probe_s
        )

    def wish_probe(self) -> None:
        """Expect that the consumer will ask for a probe."""
        with self._lock:
            self._probe_wished = True
            self._next_probe_s = self._now_s() + PROBE_EVERY_S

    def begin_probe(self) -> bool:
        """Tell whether a probe was wished for; it is none any longer."""
        with self._lock:
            wished, self._probe_wished = self._probe_wished, False
        return wished

    def end_probe(self, took_s: float) -> None:
        """Let as long pass to the next probe as this one, in seconds, asks for."""
        with self._lock:
            self._next_probe_s = self._now_s() + max(PROBE_EVERY_S, took_s / self._probe_share)

    def queue(self, wire_bytes: float, decode_s: float = 0.0) -> None:
        """Take note of bytes, and of the seconds to decode them, that were promised or (negative) are on their way."""
        with self._lock:
            self._backlog_bytes += wire_bytes
            self._backlog_s += decode_s

    def attach(self, connection: socket.socket) -> None:
        """Start to follow a connection that will send on this link."""
        progress = TcpProgress.of(connection)
        with self._lock:
            if progress is not None:
                self._accounts[connection] = progress

    def detach(self, connection: socket.socket) -> None:
        """Take a last look at a connection and forget it."""
        self._look(connection, final=True)
        with self._lock:
            self._accounts.pop(connection, None)

    def sample(self, connection: socket.socket) -> None:
        """Look at a connection's account; what is too little for a sample waits for more."""
        self._look(connection, final=False)

    def observe(self, wire_bytes: int, busy_s: float) -> None:
        """Take note of bytes that the kernel does not see, because others than TCP carry them.

        Args:
            wire_bytes: How many arrived.
            busy_s: Seconds in which they were on their way.
        """
        with self._lock:
            self._acked_bytes += wire_bytes
            self._busy_s += busy_s
            self._learn(self._now_s(), final=False)

    def _look(self, connection: socket.socket, *, final: bool) -> None:
        time_s = self._now_s()
        with self._lock:
            self._see(time_s)
            now = self._accounts.get(connection)
            if now is not None:
                self._rtt_s = now.min_rtt_s
                self._learn(time_s, final=final)

    def _see(self, time_s: float) -> None:
        """Bring the accounts up to date, all at once, or the bytes of one would be held against the time of another."""
        acked = 0
        looked_s = 0.0
        for each, last in self._accounts.items():
            seen = TcpProgress.of(each)
            # between transfers, when most choices are made, nothing has changed
            if seen is None or seen == last:
                continue
            self._accounts[each] = seen
            self._delivery_bytes_per_s = seen.delivery_bytes_per_s
            acked += seen.acked_bytes - last.acked_bytes
            busy_s = max(0.0, seen.busy_s - last.busy_s)
            self._busy_s += busy_s
            looked_s = max(looked_s, busy_s)
        # one look, one doubt, however many connections: they wait for the same link
        self._slack_s += min(looked_s, SLACK_S)
        if not acked:
            return
        # a bucket that fills at the link's rate while that rests: chunks that each fit into it do not all fit if they
        # come one by one, and what is sent without pause passes as it comes
        if self._goodput is not None:
            idle_s = time_s - self._seen_s - (1 - SCATTER) * looked_s
            self._allowed_bytes += max(0.0, idle_s) * self._goodput.bytes_per_s
        if self._goodput is None or self._allowed_bytes > BURST_BYTES:
            self._allowed_bytes = float(BURST_BYTES)
        self._seen_s = time_s
        burst_bytes = min(acked, self._allowed_bytes)
        self._allowed_bytes -= burst_bytes
        self._acked_bytes += acked
        self._burst_bytes += burst_bytes

    def _learn(self, time_s: float, *, final: bool) -> None:
        """Learn from what was seen since the last sample, if that is enough for one."""
        if not self._acked_bytes and not self._busy_s:
            return
        busy_s = min(self._busy_s, time_s - self._since_s)
        slack_s = self._slack_s
        if time_s - self._since_s - busy_s < SLACK_S:
            # something waited all the time: what came late at one look was missing at none, but for the last
            slack_s = min(slack_s, SLACK_S)
        enough = BURST_BYTES if final else SAMPLE_BYTES
        complete = self._acked_bytes >= enough or busy_s >= SAMPLE_S
        if busy_s < TICKS_S:
            steady_bytes = self._acked_bytes - self._burst_bytes
            complete = (
                self._goodput is not None
                and steady_bytes >= FAST_BYTES
                # or little would be learnt of a link that is far faster
                and steady_bytes > 1.5 * self._goodput.bytes_per_s * TICKS_S
            )
            busy_s = slack_s = TICKS_S
            if self._acked_bytes >= 8 * SAMPLE_BYTES and self._delivery_bytes_per_s > 0:
                # too fast for ticks: the kernel's own estimate, of so many bytes, serves
                complete = True
                busy_s = self._acked_bytes / self._delivery_bytes_per_s
                slack_s = 0.0
        if complete:
            known = self._goodput
            if busy_s > 2 * slack_s:
                self._sure_s = self._told_s = time_s
            elif known is not None and time_s - self._sure_s > FORGET_S:
                self._sure_s = time_s
                hoped = min(2 * known.shown_bytes_per_s, self._best_bytes_per_s)
                known = replace(known, shown_bytes_per_s=max(known.shown_bytes_per_s, hoped))
            seen = Sample(
                acked_bytes=self._acked_bytes,
                burst_bytes=self._burst_bytes,
                busy_s=busy_s,
                slack_s=slack_s,
            )
            self._goodput = blend(known, seen)
            if self._goodput is not None:
                self._best_bytes_per_s = max(self._best_bytes_per_s, self._goodput.bytes_per_s)
            self._acked_bytes, self._burst_bytes = 0, 0
            self._busy_s = self._slack_s = 0.0
            self._since_s = time_s


class LinkBook:
    """The links to all consumers, by address; the least recently used are forgotten.

    Args:
        codec_threads: How many threads encode.
        probe_share: Most of a link's time that may go into probes; 0 for none.

    Attributes:
        coders: What encodes for all of them.
    """

    def __init__(self, codec_threads: int = 1, probe_share: float = PROBE_SHARE) -> None:
        self._probe_share = probe_share
        self.coders = Coders(codec_threads, time.monotonic())
        self._lock = threading.Lock()
        self._links: OrderedDict[str, LinkState] = OrderedDict()

    def link(self, peer: str) -> LinkState:
        """Return the link to a peer."""
        with self._lock:
            state = self._links.setdefault(peer, LinkState(probe_share=self._probe_share))
            self._links.move_to_end(peer)
            while len(self._links) > MAX_LINKS:
                self._links.popitem(last=False)
            return state
