"""How one transfer is coded: as was chosen when it began, and from some chunk on as its link has become."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvserve_api.profile_set import NONE
from kvserve_connector.chunks import Chunk
from kvserve_connector.encoder import Coded
from kvserve_connector.links import BURST_BYTES, LinkState
from kvserve_connector.loads import Coders
from kvserve_connector.midway import MOST_CHANGES, by_merit, moved
from kvserve_connector.promises import Promise
from kvserve_connector.replies import Part
from kvserve_connector.selector import Choice
from kvserve_strategies import Pipeline

FIRST_BYTES: Final = 4 * BURST_BYTES
"""Wire bytes of a first transfer after which a link that nothing was known of may be found to be another."""
NOTHING_LEFT: Final = 1e-9
"""A smaller share of a transfer is what is left of sums and differences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rest:
    """What is left of a transfer, to be chosen for again.

    Attributes:
        before: The choice until now.
        native_bytes: Native KV bytes of the chunks that nobody has begun to code.
        chunks: These chunks.
        before_bytes_per_s: The link's goodput for which was chosen.
    """

    before: Choice
    native_bytes: int
    chunks: Sequence[Chunk]
    before_bytes_per_s: float


Again: TypeAlias = Callable[[Rest], Choice | None]
"""Chooses for the rest of a transfer; None to go on as before."""


@dataclass(slots=True)
class _Begun:
    """A choice, and what came of it so far."""

    choice: Choice
    promise: Promise
    native_bytes: int = 0
    wire_bytes: int = 0
    encode_s: float = 0.0


class Course:
    """The choices of one transfer; of the thread that sends it.

    What it asks of link, coders and consumer is promised when it is made, until `end`.

    Args:
        choice: The first one.
        chunks: The plan.
        native_bytes: Of each chunk of the plan.
        link: The link to the consumer.
        coders: What encodes.
        prior_bytes_per_s: Stands for a goodput that was never measured.
        again: Chooses for the rest; None where nothing may change.

    Attributes:
        link: The link.
    """

    def __init__(
        self,
        choice: Choice,
        chunks: Sequence[Chunk],
        native_bytes: Sequence[int],
        link: LinkState,
        coders: Coders,
        prior_bytes_per_s: float,
        again: Again | None,
    ) -> None:
        self._chunks = chunks
        self._native = native_bytes
        self._total = sum(native_bytes)
        self.link = link
        self._coders = coders
        self._prior_bytes_per_s = prior_bytes_per_s
        self._again = again if by_merit(choice.selection) else None
        self._before_bytes_per_s = self._bytes_per_s
        # the first bytes over a link that nothing is known of may all be a burst
        self._unsure_bytes = FIRST_BYTES if link.goodput_bytes_per_s is None else 0
        self._waiting = dict.fromkeys(range(len(chunks)))
        self._all = [self._begun(choice, 1.0)]
        self._at: dict[int, _Begun] = {}
        # those of which something is on its way, in the order in which it was begun
        self._under_way = deque(self._all)

    def pipeline(self, place: int) -> Pipeline:
        """Return what codes the chunk at a place of the plan, whose coding begins now."""
        self._reconsider()
        self._waiting.pop(place, None)
        last = self._at[place] = self._all[-1]
        return last.choice.pipeline

    def coded(self, coded: Coded) -> None:
        """Take note of a chunk that is coded, and perhaps still waits for the link; from any thread."""
        begun, share = self._at[coded.place], self._native[coded.place] / self._total
        begun.promise.coded(share)
        if begun.choice.selection.profile != NONE:
            self._coders.observe(coded.encode_s, begun.promise.encode_s, share)

    def sent(self, coded: Coded) -> None:
        """Take note of a chunk that is on its way."""
        begun, native_bytes = self._at[coded.place], self._native[coded.place]
        begun.native_bytes += native_bytes
        begun.wire_bytes += len(coded.blob)
        begun.encode_s += coded.encode_s
        self._unsure_bytes -= len(coded.blob)
        share = native_bytes / self._total
        while len(self._under_way) > 1 and self._under_way[0].promise.left < NOTHING_LEFT:
            self._under_way.popleft().promise.end()
        self._under_way[0].promise.keep(share)

    def end(self) -> None:
        """Promise nothing any more."""
        for begun in self._under_way:
            begun.promise.end()

    @property
    def parts(self) -> Mapping[str, Part]:
        """What each profile has coded so far."""
        parts: dict[str, Part] = {}
        for begun in self._all:
            if begun.native_bytes:
                name = begun.choice.selection.profile
                before = parts.get(name, Part(0, 0, 0.0))
                parts[name] = Part(
                    before.native_bytes + begun.native_bytes,
                    before.wire_bytes + begun.wire_bytes,
                    before.encode_s + begun.encode_s,
                )
        return parts

    @property
    def _bytes_per_s(self) -> float:
        return self.link.goodput_bytes_per_s or self._prior_bytes_per_s

    def _reconsider(self) -> None:
        """Choose again for what nobody has begun to code, if the link has become another one."""
        if self._again is None or not self._at or not self._waiting or self._unsure_bytes > 0:
            return
        now_bytes_per_s = self._bytes_per_s
        if not moved(self._before_bytes_per_s, now_bytes_per_s):
            return
        last = self._all[-1]
        native_bytes = sum(self._native[place] for place in self._waiting)
        share = native_bytes / self._total
        # or it would have to wait for itself
        last.promise.withdraw(share)
        choice = self._again(
            Rest(
                before=last.choice,
                native_bytes=native_bytes,
                chunks=[self._chunks[place] for place in self._waiting],
                before_bytes_per_s=self._before_bytes_per_s,
            )
        )
        self._before_bytes_per_s = now_bytes_per_s
        if choice is None:
            last.promise.make(share)
            return
        self._all.append(self._begun(choice, share))
        self._under_way.append(self._all[-1])
        if len(self._all) > MOST_CHANGES:
            self._again = None

    def _begun(self, choice: Choice, share: float) -> _Begun:
        promise = Promise(
            link=self.link,
            coders=self._coders,
            wire_bytes=self._total / choice.ratio,
            encode_s=choice.encode.seconds(self._total),
            decode_s=choice.decode.seconds(self._total),
        )
        promise.make(share)
        return _Begun(choice, promise)
