"""A prefill as those who read it out of the cache see it, while it is computed and afterwards."""

from collections.abc import Callable
from dataclasses import dataclass

from kvserve_api.errors import TransferError, TransferReason, WireError, WireReason
from kvserve_connector.chunks import Chunk
from kvserve_connector.commands import Pull
from kvserve_connector.form import Form
from kvserve_connector.handover import Prefill
from kvserve_connector.pace import Pace


def at_once() -> None:
    """Wait for nothing: the values are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """What is in the cache of one prefill, at one moment.

    Attributes:
        block_ids: For each group of the engine the request's blocks.
        tokens: Tokens that are there in all layers.
        next_tokens: Tokens that are there in the first `layers` layers.
        layers: See there.
        epoch: Another after each preemption.
        whole: Whether the prefill has finished.
        written: Returns when the values are readable; on a GPU the engine is ahead of them.
    """

    block_ids: tuple[tuple[int, ...], ...]
    tokens: int
    next_tokens: int = 0
    layers: int = 0
    epoch: int = 0
    whole: bool = False
    written: Callable[[], None] = at_once

    def holds(self, chunk: Chunk) -> bool:
        """Tell whether a chunk can be read."""
        return (
            self.whole
            or chunk.tokens.stop <= self.tokens
            or (chunk.tokens.stop <= self.next_tokens and chunk.layers.stop <= self.layers)
        )


@dataclass(slots=True)
class Entry:
    """A prefill as its `kvserve_connector.leases.LeaseBook` keeps it; changed under the book's lock only.

    Attributes:
        prefill: Which one.
        begun_s: When it arrived.
        computed: What is in the cache of it.
        epoch: Another whenever its blocks have been given away.
        seen_s: When something of it was in the cache first.
        seen_tokens: How many tokens were not in the cache then.
        kept: Whether it has finished and waits for its consumer.
        model_s: Seconds from its arrival to its end.
        ended_s: When it has finished.
        expires_s: When it is given up unless it is claimed.
        claimed: Whether it is being sent.
        outcome: How it has ended, or will as soon as the engine is done with it.
    """

    prefill: Prefill
    begun_s: float
    computed: Computed | None = None
    epoch: int = 0
    seen_s: float = 0.0
    seen_tokens: int = 0
    kept: bool = False
    model_s: float = 0.0
    ended_s: float = 0.0
    expires_s: float = 0.0
    claimed: bool = False
    outcome: str | None = None


class Claim:
    """A prefill as the thread that sends it sees it; the thread must `kvserve_connector.leases.LeaseBook.end` it.

    Args:
        entry: The prefill as the book keeps it.
        now_s: The book's clock.
        pace: Of the engine's prefills.

    Attributes:
        prefill: Which one.
    """

    def __init__(self, entry: Entry, now_s: Callable[[], float], pace: Pace) -> None:
        self._entry = entry
        self._now_s = now_s
        self._pace = pace
        self.prefill = entry.prefill

    @property
    def kept(self) -> bool:
        """Whether it has finished."""
        return self._entry.kept

    @property
    def model_s(self) -> float:
        """Seconds from its arrival to its end, or to now."""
        entry = self._entry
        return entry.model_s if entry.kept else self._now_s() - entry.begun_s

    @property
    def since_end_s(self) -> float:
        """Seconds since its end; 0 before."""
        entry = self._entry
        return max(0.0, self._now_s() - entry.ended_s) if entry.kept else 0.0

    @property
    def left_s(self) -> float:
        """Seconds that it will still take at least, as far as is known; 0 when it has finished."""
        entry = self._entry
        if entry.kept or entry.computed is None:
            return 0.0
        return self._pace.left_s(entry.seen_tokens, self._now_s() - entry.seen_s)

    @property
    def computed(self) -> Computed | None:
        """What is there now; None before anything is, and after a preemption.

        Blocks that were read by it hold what they should only if, after reading, it is still `valid`.

        Raises:
            TransferError: The prefill was aborted.
        """
        if self._entry.outcome is not None:
            raise TransferError(
                TransferReason.CANCELLED, f"the prefill ended: {self._entry.outcome}"
            )
        return self._entry.computed

    def valid(self, seen: Computed) -> bool:
        """Tell whether the blocks of what was seen are still this request's."""
        return self._entry.epoch == seen.epoch

    def check(self, pull: Pull, form: Form) -> None:
        """Refuse a consumer for which these bytes would mean something else.

        Args:
            pull: What it asks for, and of what.
            form: Of this engine's cache.

        Raises:
            WireError: Its model, layout, rank or prompt is another one.
        """
        if pull.fingerprint != form.fingerprint:
            raise WireError(WireReason.MODEL_MISMATCH, "the consumer serves another model")
        if pull.layout != form.layout:
            raise WireError(WireReason.LAYOUT_MISMATCH, f"here is {form.layout}")
        if (pull.rank, pull.ranks) != (form.rank, form.ranks):
            raise WireError(
                WireReason.LAYOUT_MISMATCH,
                f"the consumer is worker {pull.rank} of {pull.ranks}, this is {form.rank} of"
                f" {form.ranks}: give both tensor_parallel_size {form.ranks}",
            )
        if pull.blocks != form.blocks:
            raise WireError(
                WireReason.LAYOUT_MISMATCH,
                "the consumer's blocks hold something else: another vLLM, attention backend or cache dtype",
            )
        if (pull.tokens.stop, pull.prompt_digest) != (
            self.prefill.tokens,
            self.prefill.prompt_digest,
        ):
            raise WireError(WireReason.RANGE_MISMATCH, "the consumer's prompt is another one")
