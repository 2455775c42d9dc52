"""The way of one producer-consumer pair as its connector uses it: no chunk is begun before it can nearly be sent.

As in `controller_queue` there are three servers, producer's codec, link and consumer's codec, that serve chunks one at
a time in the order in which they reach them. But of a transfer at most `kvserve_connector.encoder.AHEAD` chunks are
begun and not yet sent, and what codes a chunk is settled when its coding begins.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from controller_queue import Capacity, Sent, Work
from controller_replay import Decider, Run, violations
from controller_scenarios import Scenario
from kvserve_connector.encoder import AHEAD


@dataclass(slots=True, eq=False)
class Passing:
    """One transfer on its way.

    Attributes:
        index: Number of its arrival.
        sent: What became of it so far; its work is what was begun.
        work: What all of it would ask of the servers as it is coded now, in equal chunks.
        name: What codes it now.
        begun: How many chunks have begun to be coded.
        gone: How many have been sent.
        names: What coded each chunk that has begun.
        sizes: Wire bytes of each chunk that has reached the link.
    """

    index: int
    sent: Sent
    work: Work
    name: str
    begun: int = 0
    gone: int = 0
    names: list[str] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)


class Watcher(Protocol):
    """Sees chunks begin and go, and may have the next ones coded otherwise."""

    def begins(self, passing: Passing, now_s: float) -> None:
        """Take note that a chunk begins to be coded; may change what the transfer's work is from it on."""

    def coded(self, passing: Passing, now_s: float) -> None:
        """Take note that the next chunk is coded and reaches the link."""

    def went(self, passing: Passing, now_s: float) -> None:
        """Take note that a chunk has been sent."""


class _Blind:
    """Changes nothing."""

    def begins(self, passing: Passing, now_s: float) -> None: ...

    def coded(self, passing: Passing, now_s: float) -> None: ...

    def went(self, passing: Passing, now_s: float) -> None: ...


_Piece = tuple[Passing, float, float, float]
"""A chunk: whose, seconds to encode, wire bytes, seconds to decode."""


class Way:
    """The three servers.

    Args:
        capacity: Of the link.
        rtt_s: Round trip, added to each transfer once.
        watcher: Sees what happens.

    Attributes:
        link_free_s: When all that has reached the link is sent.
    """

    def __init__(self, capacity: Capacity, rtt_s: float, watcher: Watcher | None = None) -> None:
        self.capacity = capacity
        self.rtt_s = rtt_s
        self.link_free_s = 0.0
        self._decoder_free_s = 0.0
        self._watcher = watcher or _Blind()
        self._coding: deque[_Piece] = deque()
        self._busy = False
        # when, a number that settles ties, and the chunk that is coded then, or whose chunk is sent then
        self._events: list[tuple[float, int, _Piece | Passing]] = []
        self._count = 0

    def send(self, passing: Passing) -> None:
        """Begin a transfer; times never go back from one call to the next, nor behind those of `advance`."""
        self._more(passing, passing.sent.at_s)

    def advance(self, now_s: float) -> None:
        """Let everything happen that happens by now."""
        while self._events and self._events[0][0] <= now_s:
            at_s, _, what = heapq.heappop(self._events)
            if isinstance(what, Passing):
                what.gone += 1
                self._watcher.went(what, at_s)
                self._more(what, at_s)
            else:
                self._busy = False
                self._reach(what, at_s)
                self._code(at_s)

    def finish(self) -> None:
        """Let everything end: no more transfers come."""
        self.advance(math.inf)

    def preview_s(self, now_s: float, work: Work, *, foresight: bool = True) -> float:
        """Return how long a transfer would take if it began now, none came after it and none were changed.

        `advance` must have been called with this time.

        Args:
            now_s: When it begins.
            work: What it asks of the servers.
            foresight: Whether the link goes on as it truly will, or as it is now.
        """
        capacity = self.capacity
        if not foresight:
            capacity = Capacity.of([0.0], [capacity.at(now_s)])
        other = Way(capacity, self.rtt_s)
        other.link_free_s, other._decoder_free_s = self.link_free_s, self._decoder_free_s
        copies: dict[Passing, Passing] = {}

        def copy(one: Passing) -> Passing:
            if (made := copies.get(one)) is None:
                sent = Sent(one.sent.at_s, one.sent.work, list(one.sent.link), one.sent.done_s)
                made = copies[one] = Passing(
                    one.index, sent, one.work, one.name, one.begun, one.gone
                )
            return made

        other._busy, other._count = self._busy, self._count
        other._coding = deque((copy(piece[0]), *piece[1:]) for piece in self._coding)
        other._events = [
            (at_s, n, copy(what) if isinstance(what, Passing) else (copy(what[0]), *what[1:]))
            for at_s, n, what in self._events
        ]
        own = Passing(-1, Sent(now_s, work), work, "")
        other.send(own)
        while math.isinf(own.sent.done_s):
            other.advance(other._events[0][0])
        return own.sent.total_s

    def _more(self, passing: Passing, now_s: float) -> None:
        while passing.begun < passing.work.chunks and passing.begun - passing.gone < AHEAD:
            self._watcher.begins(passing, now_s)
            passing.begun += 1
            passing.names.append(passing.name)
            work = passing.work
            share = 1 / work.chunks
            piece = passing, work.encode_s * share, work.wire_bytes * share, work.decode_s * share
            done = passing.sent.work
            passing.sent.work = Work(
                done.encode_s + piece[1],
                done.wire_bytes + piece[2],
                done.decode_s + piece[3],
                work.chunks,
            )
            self._coding.append(piece)
        self._code(now_s)

    def _code(self, now_s: float) -> None:
        if self._coding and not self._busy:
            self._busy = True
            piece = self._coding.popleft()
            self._at(now_s + piece[1], piece)

    def _reach(self, piece: _Piece, now_s: float) -> None:
        passing, _, wire_bytes, decode_s = piece
        self._watcher.coded(passing, now_s)
        start_s = max(self.link_free_s, now_s)
        self.link_free_s = end_s = self.capacity.finish_s(start_s, wire_bytes)
        passing.sent.link.append((now_s, start_s, end_s))
        passing.sizes.append(wire_bytes)
        arrived_s = end_s + self.rtt_s
        if decode_s > 0:
            self._decoder_free_s = arrived_s = max(self._decoder_free_s, arrived_s) + decode_s
        if len(passing.sent.link) == passing.work.chunks:
            passing.sent.done_s = arrived_s
        self._at(end_s, passing)

    def _at(self, at_s: float, what: _Piece | Passing) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, what))


def replay_on_way(scenario: Scenario, decider: Decider, watcher: Watcher | None = None) -> Run:
    """Send all arrivals as a policy decides, who may watch and change what is on its way."""
    way = Way(scenario.capacity, scenario.rtt_s, watcher)
    transfers: list[Passing] = []
    for index, arrival in enumerate(scenario.arrivals):
        way.advance(arrival.at_s)
        name = decider.choose(index, arrival, way)
        work = scenario.work(index, name)
        passing = Passing(index, Sent(arrival.at_s, Work(0.0, 0.0, 0.0, work.chunks)), work, name)
        decider.sent(index, name, passing.sent)
        way.send(passing)
        transfers.append(passing)
    way.finish()
    mixed = {one.index: tuple(one.names) for one in transfers if len(set(one.names)) > 1}
    return Run(
        chosen=tuple(one.names[0] for one in transfers),
        total_s=tuple(one.sent.total_s for one in transfers),
        violations=violations(scenario, [one.names for one in transfers]),
        mixed=mixed,
    )
