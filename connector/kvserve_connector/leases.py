"""The prefills a producer computes or keeps for their consumers, and how each of them ends."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from kvserve_api.errors import TransferError, TransferReason, WireReason
from kvserve_connector.claims import Claim, Computed, Entry, at_once
from kvserve_connector.handover import Lease, Prefill, Progress
from kvserve_connector.pace import Pace

SENT: Final = "Sent"
"""How a lease ends when its consumer has everything; other ends are transfer reasons."""
RELEASED: Final = "Released"
"""How a lease ends that its consumer does not need."""
MAX_ENDED: Final = 4096


class LeaseBook:
    """All prefills of one producer for consumers; safe from any thread.

    The engine's blocks may be reused from the moment in which `take_ended` names a request, so a lease that is being
    sent never expires: its sender ends it. The blocks of a prefill that has not finished are the engine's: whoever
    reads them looks afterwards whether they still were the request's.

    Args:
        lease_s: How long an unclaimed lease lasts, in seconds.
        now_s: A clock that never goes back.
        ended: Called when `take_ended` has something to return; must not wait.
    """

    def __init__(
        self,
        lease_s: float,
        now_s: Callable[[], float] = time.monotonic,
        ended: Callable[[], None] = at_once,
    ) -> None:
        self._lease_s = lease_s
        self._now_s = now_s
        self._on_end = ended
        self._changed = threading.Condition()
        self._held: dict[str, Entry] = {}
        self._names: dict[str, str] = {}
        self._ended: list[str] = []
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._pace = Pace()

    def begin(self, prefill: Prefill) -> None:
        """Take note of a prefill that has arrived."""
        with self._changed:
            if prefill.request_id in self._held:
                return
            entry = self._held[prefill.request_id] = Entry(prefill, self._now_s())
            name = prefill.transfer_id
            if name is not None:
                self._names[name] = prefill.request_id
                # its consumer was here before it, and does not need it
                entry.outcome = self._reasons.get(name)
            self._changed.notify_all()

    def advance(
        self,
        progress: Progress,
        *,
        layers: int | None = None,
        written: Callable[[], None] = at_once,
    ) -> None:
        """Take note of how far a running prefill is.

        Args:
            progress: After the step that is running, or has ended.
            layers: How many layers it has computed so far; None if it has ended.
            written: See `Computed`.
        """
        with self._changed:
            entry = self._held.get(progress.request_id)
            if entry is None or entry.kept:
                return
            before = entry.computed
            if before is None:
                entry.seen_s = self._now_s()
                there = progress.tokens if layers is None else progress.before
                entry.seen_tokens = entry.prefill.tokens - there
            if layers is None:
                entry.computed = Computed(
                    block_ids=progress.block_ids,
                    tokens=progress.tokens,
                    epoch=entry.epoch,
                    written=written,
                )
            else:
                entry.computed = Computed(
                    block_ids=progress.block_ids,
                    tokens=0 if before is None else before.tokens,
                    next_tokens=progress.tokens,
                    layers=layers,
                    epoch=entry.epoch,
                )
            self._changed.notify_all()

    def preempt(self, request_id: str) -> None:
        """Take note that a running prefill has lost its blocks; it begins anew."""
        with self._changed:
            entry = self._held.get(request_id)
            if entry is not None and not entry.kept:
                entry.computed = None
                entry.epoch += 1

    def stop(self, request_id: str) -> None:
        """Take note that a running prefill has ended, and is not kept."""
        with self._changed:
            entry = self._held.get(request_id)
            if entry is not None and not entry.kept:
                entry.computed = None
                entry.epoch += 1
                entry.outcome = entry.outcome or TransferReason.CANCELLED
                self._forget(request_id, entry.outcome)

    def add(self, lease: Lease) -> None:
        """Keep a prefill from now on."""
        with self._changed:
            entry = self._held.get(lease.request_id)
            if entry is None:
                prefill = Prefill(
                    request_id=lease.request_id,
                    tokens=lease.tokens,
                    prompt_digest=lease.prompt_digest,
                    workload=lease.workload,
                )
                entry = self._held[lease.request_id] = Entry(prefill, self._now_s())
            elif lease.tokens != entry.prefill.tokens:
                # nobody who was promised the whole prompt can use it
                entry.outcome = entry.outcome or WireReason.RANGE_MISMATCH
            if not entry.kept:
                # before it says that it has
                entry.ended_s = self._now_s()
                if entry.computed is not None:
                    self._pace.add(entry.seen_tokens, entry.ended_s - entry.seen_s)
            entry.kept = True
            entry.computed = Computed(
                block_ids=lease.block_ids, tokens=lease.tokens, epoch=entry.epoch, whole=True
            )
            entry.model_s = lease.model_s
            entry.expires_s = self._now_s() + self._lease_s
            if entry.outcome is not None:
                self._end(lease.request_id, entry.outcome)
            self._changed.notify_all()

    def claim(self, request_id: str, wait_s: float) -> Claim:
        """Take a finished prefill for sending; the caller must `end` it.

        A consumer can be faster than the news of the prefill's end, so it is waited for.

        Args:
            request_id: Which one.
            wait_s: Most seconds to wait for it.

        Raises:
            TransferError: It has ended, is being sent already, or did not appear.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    request_id in self._reasons
                    or ((entry := self._held.get(request_id)) is not None and entry.kept)
                ),
                wait_s,
            )
            entry = self._held.get(request_id)
            return self._claim(request_id, entry if entry and entry.kept else None)

    def claim_transfer(self, transfer_id: str) -> Claim | None:
        """Take a prefill for sending, before it has finished or after; the caller must `end` it.

        Returns:
            None if it has not arrived yet.

        Raises:
            TransferError: It has ended, or is being sent already.
        """
        with self._changed:
            if transfer_id not in self._names and transfer_id not in self._reasons:
                return None
            return self._claim(transfer_id, self._held.get(self._names.get(transfer_id, "")))

    def unclaimed(self) -> list[Claim]:
        """Return the prefills, running or kept, that nobody sends yet; they may be looked at, not ended."""
        with self._changed:
            return [
                Claim(entry, self._now_s, self._pace)
                for entry in self._held.values()
                if not entry.claimed and entry.outcome is None and entry.prefill.transfer_id is None
            ]

    def wait(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something holds that changes as prefills go on; tell whether it does."""
        with self._changed:
            return self._changed.wait_for(holds, timeout_s)

    def end(self, request_id: str, reason: str) -> None:
        """End a lease, or have it end as soon as its prefill has; one that is not known is left alone."""
        with self._changed:
            self._end(request_id, reason)

    def release(self, name: str, *, transfer: bool = False) -> None:
        """End a lease that its consumer does not need, unless it is being sent.

        Args:
            name: Its request, or its transfer, which may come later.
            transfer: Which of both.
        """
        with self._changed:
            entry = self._held.get(self._names.get(name, "") if transfer else name)
            if entry is None and transfer:
                self._remember(name, RELEASED)
            elif entry is not None and not entry.claimed:
                self._end(entry.prefill.request_id, RELEASED)

    def renew(self, names: Iterable[str]) -> None:
        """Begin the time of leases anew whose consumers still want them."""
        with self._changed:
            for name in names:
                entry = self._held.get(self._names.get(name, name))
                if entry is not None and entry.kept:
                    entry.expires_s = self._now_s() + self._lease_s

    def take_ended(self) -> tuple[set[str], dict[str, int]]:
        """Return the requests whose blocks are free since the last call, and how many ended by which reason.

        Leases that nobody claimed in time end here.
        """
        with self._changed:
            now_s = self._now_s()
            for request_id in [
                key
                for key, entry in self._held.items()
                if entry.kept and not entry.claimed and entry.expires_s <= now_s
            ]:
                self._end(request_id, TransferReason.EXPIRED)
            ended, self._ended = set(self._ended), []
            counts, self._counts = dict(self._counts), Counter()
            return ended, counts

    @property
    def claimed(self) -> bool:
        """Whether one of them is being sent."""
        with self._changed:
            return any(entry.claimed for entry in self._held.values())

    def __len__(self) -> int:
        with self._changed:
            return len(self._held)

    def _claim(self, name: str, entry: Entry | None) -> Claim:
        if entry is None or entry.outcome is not None:
            reason = self._reasons.get(name) if entry is None else entry.outcome
            detail = (
                f"no prefill {name!r} is held"
                if reason is None
                else f"the prefill has ended: {reason}"
            )
            raise TransferError(TransferReason.EXPIRED, detail)
        if entry.claimed:
            raise TransferError(TransferReason.PEER_REFUSED, "the prefill is being sent already")
        entry.claimed = True
        return Claim(entry, self._now_s, self._pace)

    def _end(self, request_id: str, reason: str) -> None:
        entry = self._held.get(request_id)
        if entry is None:
            return
        if not entry.kept:
            # the engine has its blocks until it finishes
            entry.outcome = str(reason)
            return
        entry.epoch += 1
        self._ended.append(request_id)
        self._counts[str(reason)] += 1
        self._forget(request_id, reason)
        self._on_end()

    def _forget(self, request_id: str, reason: str) -> None:
        entry = self._held.pop(request_id)
        self._remember(request_id, reason)
        if (name := entry.prefill.transfer_id) is not None:
            self._names.pop(name, None)
            self._remember(name, reason)
        self._changed.notify_all()

    def _remember(self, name: str, reason: str) -> None:
        """Keep an end for a while, so that a late consumer is told at once."""
        self._reasons[name] = str(reason)
        while len(self._reasons) > MAX_ENDED:
            self._reasons.popitem(last=False)
