"""The finished prefills a producer keeps for their consumers, and how each of them ends."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvserve_api.errors import TransferError, TransferReason
from kvserve_connector.handover import Lease

SENT: Final = "Sent"
"""How a lease ends when its consumer has everything; other ends are transfer reasons."""
RELEASED: Final = "Released"
"""How a lease ends that its consumer does not need."""
MAX_ENDED: Final = 4096


@dataclass(slots=True)
class _Entry:
    lease: Lease
    expires_s: float
    claimed: bool = False


class LeaseBook:
    """All leases of one producer; safe from any thread.

    The engine's blocks may be reused from the moment in which `take_ended` names a request, so a lease that is being
    sent never expires: its sender ends it.

    Args:
        lease_s: How long an unclaimed lease lasts, in seconds.
        now_s: A clock that never goes back.
    """

    def __init__(self, lease_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._now_s = now_s
        self._changed = threading.Condition()
        self._held: dict[str, _Entry] = {}
        self._ended: list[str] = []
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def add(self, lease: Lease) -> None:
        """Keep a prefill from now on."""
        with self._changed:
            expires_s = self._now_s() + self._lease_s
            self._held[lease.request_id] = _Entry(lease, expires_s)
            self._changed.notify_all()

    def claim(self, request_id: str, wait_s: float) -> Lease:
        """Take a lease for sending; the caller must `end` it.

        A consumer can be faster than the news of the prefill's end, so an unknown lease is waited for.

        Args:
            request_id: Which one.
            wait_s: Most seconds to wait for it.

        Raises:
            TransferError: It has ended, is being sent already, or did not appear.
        """
        deadline_s = self._now_s() + wait_s
        with self._changed:
            while (entry := self._held.get(request_id)) is None:
                if (reason := self._reasons.get(request_id)) is not None:
                    raise TransferError(TransferReason.EXPIRED, f"the prefill has ended: {reason}")
                left_s = deadline_s - self._now_s()
                if left_s <= 0:
                    raise TransferError(
                        TransferReason.EXPIRED, f"no prefill {request_id!r} is held"
                    )
                self._changed.wait(left_s)
            if entry.claimed:
                raise TransferError(
                    TransferReason.PEER_REFUSED, "the prefill is being sent already"
                )
            entry.claimed = True
            return entry.lease

    def end(self, request_id: str, reason: str) -> None:
        """End a lease; one that is not held is left alone."""
        with self._changed:
            self._end(request_id, reason)

    def release(self, request_id: str) -> None:
        """End a lease that its consumer does not need, unless it is being sent."""
        with self._changed:
            entry = self._held.get(request_id)
            if entry is not None and not entry.claimed:
                self._end(request_id, RELEASED)

    def take_ended(self) -> tuple[set[str], dict[str, int]]:
        """Return the requests whose blocks are free since the last call, and how many ended by which reason.

        Leases that nobody claimed in time end here.
        """
        with self._changed:
            now_s = self._now_s()
            for request_id in [
                key
                for key, entry in self._held.items()
                if not entry.claimed and entry.expires_s <= now_s
            ]:
                self._end(request_id, TransferReason.EXPIRED)
            ended, self._ended = set(self._ended), []
            counts, self._counts = dict(self._counts), Counter()
            return ended, counts

    def __len__(self) -> int:
        with self._changed:
            return len(self._held)

    def _end(self, request_id: str, reason: str) -> None:
        if self._held.pop(request_id, None) is None:
            return
        self._ended.append(request_id)
        self._counts[str(reason)] += 1
        # remembered for a while, so that a late consumer is told at once
        self._reasons[request_id] = str(reason)
        while len(self._reasons) > MAX_ENDED:
            self._reasons.popitem(last=False)
        self._changed.notify_all()
