"""Chunks that are coded while their prefill runs, before any consumer has asked: they wait in bounded memory.

Which profile the consumer's link will want is not known yet. The one is taken that a consumer like the last one would
get now. When the consumer asks, the choice is made as always; what was coded serves if it turns out the same, else it
is thrown away.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvserve_api.errors import KVServeError
from kvserve_connector.chunks import Chunk
from kvserve_connector.claims import Claim
from kvserve_connector.encoder import Coded, Encoder
from kvserve_connector.leases import LeaseBook
from kvserve_strategies import Pipeline

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How often it is looked for memory that can be freed."""

Plan: TypeAlias = Callable[[Claim], tuple[Pipeline, Sequence[Chunk]] | None]
"""Says how a prefill is to be coded that nobody has asked for; None if it is not."""


@dataclass(slots=True)
class Stock:
    """What was coded of one prefill.

    Attributes:
        pipeline: The strategy.
        chunks: The plan.
        coded: By its place in the plan.
    """

    pipeline: Pipeline
    chunks: Sequence[Chunk]
    coded: dict[int, Coded] = field(default_factory=dict)


class Ahead:
    """Codes ahead in a thread of its own, a chunk at a time, until it is closed.

    Args:
        max_bytes: So much is kept; at most one chunk more.
        leases: The prefills.
        encoder: What codes.
        plan: How.
    """

    def __init__(self, max_bytes: int, leases: LeaseBook, encoder: Encoder, plan: Plan) -> None:
        self._max_bytes = max_bytes
        self._leases = leases
        self._encoder = encoder
        self._plan = plan
        self._lock = threading.Lock()
        self._stocks: dict[str, Stock] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvserve-ahead", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop soon."""
        self._closed = True

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(
                len(coded.blob) for stock in self._stocks.values() for coded in stock.coded.values()
            )

    def take(self, request_id: str, pipeline: Pipeline, tokens: range) -> Stock | None:
        """Return what was coded of a prefill if it is what is wanted; it is not kept any longer."""
        with self._lock:
            stock = self._stocks.pop(request_id, None)
        if stock is None or stock.pipeline is not pipeline:
            return None
        # a consumer that has the prompt's start wants other chunks
        first, last = stock.chunks[0].tokens.start, stock.chunks[-1].tokens.stop
        return stock if (first, last) == (tokens.start, tokens.stop) else None

    def _run(self) -> None:
        found: list[tuple[Claim, Stock, int]] = []

        def next_one() -> bool:
            found[:] = [] if self._closed else self._find()
            return bool(found) or self._closed

        while not self._closed:
            if not self._leases.wait(next_one, LOOK_S):
                continue
            for claim, stock, place in found:
                try:
                    coded = self._encoder.encode(claim, stock.pipeline, place, stock.chunks[place])
                except KVServeError:
                    # aborted meanwhile
                    continue
                except Exception:
                    logger.exception("coding ahead has ended")
                    return
                if coded is not None:
                    with self._lock:
                        stock.coded[place] = coded

    def _find(self) -> list[tuple[Claim, Stock, int]]:
        """Return at most one chunk that can be coded now, and forget what nobody can ask for any more."""
        claims = {claim.prefill.request_id: claim for claim in self._leases.unclaimed()}
        with self._lock:
            for request_id in self._stocks.keys() - claims.keys():
                del self._stocks[request_id]
        if self.nbytes >= self._max_bytes:
            return []
        for request_id, claim in claims.items():
            computed = claim.computed
            if computed is None:
                continue
            stock = self._stocks.get(request_id)
            if stock is None:
                # what has ended is asked for in a moment
                plan = None if claim.kept else self._plan(claim)
                if plan is None:
                    continue
                with self._lock:
                    stock = self._stocks[request_id] = Stock(*plan)
            for place, chunk in enumerate(stock.chunks):
                if place not in stock.coded and computed.holds(chunk):
                    return [(claim, stock, place)]
        return []
