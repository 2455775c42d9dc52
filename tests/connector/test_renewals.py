"""Leases that are kept alive by consumers that have no room yet."""

import threading
import time
from collections.abc import Sequence

from kv_loopback import pair
from kvserve_connector.remote import Remote
from kvserve_connector.renewals import Renewals

FROM, TO = (3, 9), (1, 2)


def make_remote(name: str, port: int) -> Remote:
    """Return a prefill elsewhere."""
    return Remote(host="h", port=port, engine_id="e", request_id=name, tokens=9)


def test_parked_consumer_renews_until_it_fetches() -> None:
    """A prefill whose consumer waits longer than a lease is still there; when the consumer is gone it expires."""
    with pair(lease_s=0.3) as both:
        for name in ("a", "b"):
            both.lease(name, 20, FROM)
        loads = {name: both.load(name, range(20), TO) for name in ("a", "b")}
        both.client.expect(loads["a"].remote)
        assert both.ended() == ({"b"}, {"Expired": 1})
        time.sleep(0.6)
        assert both.leases.take_ended() == (set(), {})
        assert both.fetch(loads["a"]).failure == ""
        assert both.ended() == ({"a"}, {"Sent": 1})


def test_released_prefill_is_not_renewed() -> None:
    """What is not wanted any more is not kept alive by an old wish."""
    with pair(lease_s=0.3) as both:
        remote = both.load("a", range(20), TO).remote
        both.client.expect(remote)
        both.client.release(remote)
        time.sleep(0.2)
        both.lease("a", 20, FROM)
        assert both.ended()[1] == {"Expired": 1}


def test_a_silent_producer_costs_the_others_nothing() -> None:
    """Each producer is told all its prefills at once, and one that hangs is left out until it has answered."""
    told: list[set[str]] = []
    hangs = threading.Event()

    def send(remotes: Sequence[Remote]) -> None:
        if remotes[0].port == 1:
            hangs.wait(10)
        told.append({remote.request_id for remote in remotes})

    renewals = Renewals(0.02, send)
    try:
        for name, port in (("a", 1), ("b", 2), ("c", 2)):
            renewals.add(make_remote(name, port))
        deadline_s = time.monotonic() + 5
        while len(told) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert {"b", "c"} in told
        assert {"a"} not in told
        hangs.set()
        while {"a"} not in told and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert {"a"} in told
    finally:
        renewals.close()
