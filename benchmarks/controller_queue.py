"""The way of one producer-consumer pair as three queues: producer's codec, link, consumer's codec.

Each serves chunks one at a time in the order in which they reach it (a work-conserving tandem of FIFO servers).
Because the order of two chunks at a queue never changes once both are there, no event loop is needed: a queue's state
is when it becomes free, and the chunks that are still being encoded. That also makes it cheap to ask what *would*
happen, which the oracle does for each of its choices.

Left out: the connector encodes at most two chunks ahead of the wire, and serves at most eight transfers at once.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

LEAST_BYTES_PER_S: Final = 1.0
"""A stalled link still moves this much, so that every transfer ends."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a link can carry: a rate that is constant between given times.

    Attributes:
        from_s: When each rate begins, rising, the first at 0; the last rate lasts for ever.
        bytes_per_s: The rates.
    """

    from_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]

    @classmethod
    def of(cls, from_s: Sequence[float], bytes_per_s: Sequence[float]) -> "Capacity":
        """Make one from equally long sequences."""
        floor = LEAST_BYTES_PER_S
        return cls(tuple(map(float, from_s)), tuple(max(floor, float(b)) for b in bytes_per_s))

    def at(self, time_s: float) -> float:
        """Return the rate at a time."""
        return self.bytes_per_s[max(0, bisect_right(self.from_s, time_s) - 1)]

    def finish_s(self, start_s: float, nbytes: float) -> float:
        """Return when so many bytes are through if the link serves nothing else from a time on."""
        index = max(0, bisect_right(self.from_s, start_s) - 1)
        last = len(self.from_s) - 1
        while index < last:
            room = (self.from_s[index + 1] - start_s) * self.bytes_per_s[index]
            if nbytes <= room:
                break
            nbytes -= room
            index += 1
            start_s = self.from_s[index]
        return start_s + nbytes / self.bytes_per_s[index]

    def bytes_between(self, start_s: float, end_s: float) -> float:
        """Return how many bytes it can carry between two times."""
        total, index = 0.0, max(0, bisect_right(self.from_s, start_s) - 1)
        while start_s < end_s:
            later = index + 1 < len(self.from_s)
            until_s = min(end_s, self.from_s[index + 1]) if later else end_s
            total += (until_s - start_s) * self.bytes_per_s[index]
            start_s, index = until_s, index + 1
        return total


@dataclass(frozen=True, slots=True)
class Work:
    """What one transfer asks of the three servers, in equal chunks.

    Attributes:
        encode_s: Seconds of the producer's codec, over all chunks; chunks without any pass it by.
        wire_bytes: Bytes on the link, over all chunks.
        decode_s: Seconds of the consumer's codec, over all chunks.
        chunks: How many.
    """

    encode_s: float
    wire_bytes: float
    decode_s: float
    chunks: int


@dataclass(slots=True)
class Sent:
    """What became of one transfer.

    Attributes:
        at_s: When it was asked for.
        work: What it asked of the servers.
        link: For each chunk that reached the link: when, when its service began, and when it ended.
        done_s: When its last chunk was decoded; infinity until that is known.
    """

    at_s: float
    work: Work
    link: list[tuple[float, float, float]] = field(default_factory=list)
    done_s: float = math.inf

    @property
    def total_s(self) -> float:
        """From the question to the last decoded chunk."""
        return self.done_s - self.at_s


Waiting = tuple[float, int, Sent]
"""A chunk that is still being encoded: when it reaches the link, a number that settles ties, whose it is."""


class Tandem:
    """The three queues of one pair.

    Args:
        capacity: Of the link.
        rtt_s: Round trip, added to each transfer once.
    """

    def __init__(self, capacity: Capacity, rtt_s: float = 0.0) -> None:
        self.capacity = capacity
        self.rtt_s = rtt_s
        self.encoder_free_s = 0.0
        self.link_free_s = 0.0
        self.decoder_free_s = 0.0
        self._waiting: list[Waiting] = []
        self._count = 0

    def advance(self, now_s: float) -> None:
        """Settle what no later transfer can change any more: chunks that have reached the link by now."""
        cut = bisect_right(self._waiting, now_s, key=lambda chunk: chunk[0])
        for reached_s, _, sent in self._waiting[:cut]:
            work = sent.work
            start_s = max(self.link_free_s, reached_s)
            end_s = self.capacity.finish_s(start_s, work.wire_bytes / work.chunks)
            self.link_free_s = end_s
            sent.link.append((reached_s, start_s, end_s))
            arrived_s = end_s + self.rtt_s
            if work.decode_s > 0:
                arrived_s = max(self.decoder_free_s, arrived_s) + work.decode_s / work.chunks
                self.decoder_free_s = arrived_s
            if len(sent.link) == work.chunks:
                sent.done_s = arrived_s
        del self._waiting[:cut]

    def send(self, now_s: float, work: Work) -> Sent:
        """Begin a transfer; times never go back from one call to the next."""
        self.advance(now_s)
        sent = Sent(now_s, work)
        encoded_s = self._encoded_s(now_s, work)
        for reached_s in encoded_s:
            self._count += 1
            insort(self._waiting, (reached_s, self._count, sent))
        if work.encode_s > 0:
            self.encoder_free_s = encoded_s[-1]
        return sent

    def finish(self) -> None:
        """Settle everything: no more transfers come."""
        self.advance(math.inf)

    def preview_s(self, now_s: float, work: Work, *, foresight: bool = True) -> float:
        """Return how long a transfer would take if it began now and none came after it; changes nothing.

        `advance` must have been called with this time.

        Args:
            now_s: When it begins.
            work: What it asks of the servers.
            foresight: Whether the link goes on as it truly will, or as it is now.
        """
        link_s, decoder_s = self.link_free_s, self.decoder_free_s
        capacity = self.capacity
        if not foresight:
            capacity = Capacity.of([0.0], [capacity.at(now_s)])
        finish_s, rtt_s = capacity.finish_s, self.rtt_s
        own_bytes, own_decode_s = work.wire_bytes / work.chunks, work.decode_s / work.chunks
        index, end_s, waiting = 0, now_s, self._waiting
        for reached_s in self._encoded_s(now_s, work):
            while index < len(waiting) and waiting[index][0] <= reached_s:
                other_s, _, sent = waiting[index]
                index += 1
                other = sent.work
                link_s = finish_s(max(link_s, other_s), other.wire_bytes / other.chunks)
                if other.decode_s > 0:
                    decoder_s = max(decoder_s, link_s + rtt_s) + other.decode_s / other.chunks
            link_s = finish_s(max(link_s, reached_s), own_bytes)
            end_s = link_s + rtt_s
            if own_decode_s > 0:
                end_s = decoder_s = max(decoder_s, end_s) + own_decode_s
        return end_s - now_s

    def _encoded_s(self, now_s: float, work: Work) -> list[float]:
        """Return when each chunk of a transfer that begins now reaches the link."""
        if work.encode_s <= 0:
            return [now_s] * work.chunks
        start_s, each_s = max(now_s, self.encoder_free_s), work.encode_s / work.chunks
        return [start_s + (index + 1) * each_s for index in range(work.chunks)]
