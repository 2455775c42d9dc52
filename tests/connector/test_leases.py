"""Finished prefills and how each of them ends."""

import threading
import time
from dataclasses import replace

import pytest

from kvserve_api.errors import TransferError
from kvserve_connector.claims import Claim
from kvserve_connector.handover import Lease, Prefill, Progress
from kvserve_connector.leases import MAX_ENDED, LeaseBook


class Clock:
    """A clock that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


def lease(request_id: str = "a") -> Lease:
    """Return a lease."""
    return Lease(
        request_id=request_id,
        tokens=4,
        prompt_digest="d",
        block_ids=((1,),),
        workload="default",
        model_s=0.0,
    )


def test_unclaimed_lease_expires_once() -> None:
    """A lease nobody takes ends at its time, is reported once, and can't be taken any more."""
    clock = Clock()
    book = LeaseBook(10.0, clock)
    book.add(lease())
    clock.now_s = 9.9
    assert book.take_ended() == (set(), {})
    clock.now_s = 10.0
    assert book.take_ended() == ({"a"}, {"Expired": 1})
    assert book.take_ended() == (set(), {})
    with pytest.raises(TransferError, match="has ended: Expired"):
        book.claim("a", 5.0)


def test_claimed_lease_neither_expires_nor_is_released() -> None:
    """While a lease is being sent only its sender ends it, and nobody else can send it."""
    clock = Clock()
    book = LeaseBook(10.0, clock)
    book.add(lease())
    assert book.claim("a", 0.0).prefill.request_id == "a"
    clock.now_s = 100.0
    book.release("a")
    assert book.take_ended() == (set(), {})
    with pytest.raises(TransferError, match="already"):
        book.claim("a", 0.0)
    book.end("a", "Sent")
    book.end("a", "Timeout")
    assert book.take_ended() == ({"a"}, {"Sent": 1})


def test_claim_waits_for_news() -> None:
    """A claim that comes early gets the lease when it is there, and gives up when it does not come."""
    book = LeaseBook(10.0)
    threading.Timer(0.1, lambda: book.add(lease())).start()
    assert book.claim("a", 5.0).kept
    started_s = time.monotonic()
    with pytest.raises(TransferError, match="no prefill 'b'"):
        book.claim("b", 0.1)
    assert 0.1 <= time.monotonic() - started_s < 2


def test_memory_of_ended_leases_is_bounded() -> None:
    """Only the latest ends are remembered."""
    book = LeaseBook(10.0)
    for index in range(MAX_ENDED + 5):
        book.add(lease(f"r{index}"))
        book.end(f"r{index}", "Sent")
    with pytest.raises(TransferError, match="no prefill"):
        book.claim("r0", 0.0)
    with pytest.raises(TransferError, match="has ended"):
        book.claim(f"r{MAX_ENDED + 4}", 0.0)
    assert len(book.take_ended()[0]) == MAX_ENDED + 5


def test_renewed_lease_lasts() -> None:
    """A lease that its consumer renews lasts as long again from then, one that nobody renews does not."""
    clock = Clock()
    book = LeaseBook(10.0, clock)
    for name in "ab":
        book.add(lease(name))
    clock.now_s = 6.0
    book.renew(["a", "unknown"])
    clock.now_s = 10.0
    assert book.take_ended() == ({"b"}, {"Expired": 1})
    clock.now_s = 16.0
    assert book.take_ended() == ({"a"}, {"Expired": 1})


def test_what_is_left_of_a_prefill_is_told_by_those_before_it() -> None:
    """A prefill of 100 tokens, 20 of them cached, took .8 s from its first layer; one of 300 will take 3 s."""
    clock = Clock()
    book = LeaseBook(10.0, clock)

    def advance(request_id: str, tokens: int, *, before: int = 0, layers: int | None) -> None:
        book.advance(
            Progress(request_id=request_id, block_ids=((1,),), tokens=tokens, before=before),
            layers=layers,
        )

    def begin(request_id: str, tokens: int) -> Claim:
        book.begin(
            Prefill(request_id=request_id, tokens=tokens, prompt_digest="d", workload="default")
        )
        return next(each for each in book.unclaimed() if each.prefill.request_id == request_id)

    first = begin("a", 100)
    clock.now_s = 5.0
    advance("a", 60, before=20, layers=1)
    assert first.left_s == 0
    clock.now_s = 5.6
    advance("a", 100, before=60, layers=None)
    clock.now_s = 5.8
    book.add(replace(lease(), tokens=100))
    second = begin("b", 300)
    assert second.left_s == 0
    advance("b", 200, layers=1)
    assert second.left_s == pytest.approx(3.0)
    clock.now_s = 6.8
    assert second.left_s == pytest.approx(2.0)
    book.preempt("b")
    assert second.left_s == 0
    clock.now_s = 7.0
    advance("b", 200, layers=None)
    assert second.left_s == pytest.approx(1.0)
