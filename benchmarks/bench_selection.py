"""How long the connector takes to choose a profile for one transfer: the target is below 20 µs at the 99th percentile.

Two rows tell how quiet the machine was, timed as the others are: a function that does nothing, and arithmetic for about
as long as a choice takes, which is interrupted as often. Then the choice, the look at the link before it
(`LinkState.snapshot`, which asks the kernel about each of the link's connections), and both. Run it with ``python
benchmarks/bench_selection.py [--json]``; it takes a few seconds.
"""

import argparse
import gc
import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from kvserve_api.latency import Link, StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.table import (
    MAX_CANDIDATES,
    Candidate,
    ClassRule,
    DecisionTable,
    Doubt,
    OnControllerLoss,
    Version,
)
from kvserve_connector.coding import known_stages
from kvserve_connector.links import LinkBook, LinkState
from kvserve_connector.ready import ReadyTable
from kvserve_connector.selector import Selector
from kvserve_strategies import PRESETS

ROUNDS = 50_000
WARM_UP = 1_000
STEPS = 250
SENT_BYTES = 1 << 20
PRIOR_BYTES_PER_S = 6.25e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--connections", type=int, default=1, help="of the link")
    options = parser.parse_args()

    selector, ready = Selector(), ReadyTable.of(_full_table())
    selector.install(ready)
    first = known_stages(), frozenset({"sha256:" + "0" * 64})
    # what is read from the next request is equal, but not the same
    stages, bundles = (frozenset(each.encode().decode() for each in names) for names in first)
    book = LinkBook()

    def look() -> Link:
        return link.snapshot(PRIOR_BYTES_PER_S, book.coders)

    def choose(known: Link, index: int) -> None:
        selector.choose(
            "default",
            native_bytes=20_000_000 + index,
            link=known,
            chunks=6,
            stages=stages,
            bundles=bundles,
            peer="10.0.0.1",
        )

    with ExitStack() as stack:
        link = book.link("10.0.0.1")
        _connect(link, options.connections, stack)
        for _ in range(5):
            for arrivals in (link.arrivals, book.coders.arrivals):
                arrivals.add(time.monotonic(), 20_000_000)
        link.queue(1e6, 0.01)
        book.coders.promise(0.01)
        known = look()
        ready.decodable(*first)
        rows = {
            "nothing": _measure(lambda _: None),
            "arithmetic": _measure(_reckon),
            "select": _measure(lambda index: choose(known, index)),
            "snapshot": _measure(lambda _: look()),
            "both": _measure(lambda index: choose(look(), index)),
        }
    facts = {
        "rounds": ROUNDS,
        "candidates": MAX_CANDIDATES,
        "connections": options.connections,
    }
    if options.json:
        print(json.dumps(facts | rows))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, row in rows.items():
        values = ", ".join(f"{key} {value:.1f}" for key, value in row.items())
        print(f"{name:>10}: {values}")


def _reckon(_: int) -> int:
    total = 0
    for each in range(STEPS):
        total += each
    return total


def _measure(work: Callable[[int], object]) -> dict[str, float]:
    """Do it again and again; return percentiles of its time in microseconds."""
    # processor time beside wall time: the second counts every other process of a busy machine too
    wall_ns, cpu_ns = np.empty(ROUNDS, np.int64), np.empty(ROUNDS, np.int64)
    gc.collect()
    gc.disable()
    for index in range(-WARM_UP, ROUNDS):
        start_cpu_ns = time.thread_time_ns()
        start_ns = time.perf_counter_ns()
        work(index)
        wall_ns[index] = time.perf_counter_ns() - start_ns
        cpu_ns[index] = time.thread_time_ns() - start_cpu_ns
    gc.enable()
    return {
        f"{name}_p{percent}_us": float(np.percentile(times_ns, percent)) / 1e3
        for name, times_ns in (("wall", wall_ns), ("cpu", cpu_ns))
        for percent in (50, 99)
    }


def _connect(link: LinkState, count: int, stack: ExitStack) -> None:
    """Give a link connections on loopback that have sent something."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    for _ in range(count):
        sender = stack.enter_context(socket.create_connection(listener.getsockname()))
        receiver = stack.enter_context(listener.accept()[0])
        link.attach(sender)
        for _ in range(SENT_BYTES >> 16):
            sender.sendall(bytes(1 << 16))
            left = 1 << 16
            while left:
                left -= len(receiver.recv(left))


def _full_table() -> DecisionTable:
    """Return a table with as many candidates as there may be."""
    names = list(PRESETS)[:MAX_CANDIDATES]
    candidates = {
        name: Candidate(
            name=name,
            strategy=PRESETS[name],
            ratio=1.0 + index,
            loss_upper_bp=10.0 * index,
            encode=StageCost(floor_s=1e-4, offset_s=1e-4, bytes_per_s=2e9 / (1 + index)),
            decode=StageCost(floor_s=1e-4, offset_s=1e-4, bytes_per_s=3e9 / (1 + index)),
            doubt=Doubt(encode=0.1, decode=0.1, wire=0.02),
        )
        for index, name in enumerate(names)
    }
    return DecisionTable(
        version=Version(epoch=1, counter=1),
        policy="default/bench",
        mode=Mode.ACTIVE,
        candidates=candidates,
        rules={
            "default": ClassRule(
                goal=Goal.MINIMIZE_LATENCY,
                candidates=tuple(candidates),
                deadline_s=0.5,
                margins=dict.fromkeys(candidates, 1.2),
                explore_share=0.01,
            )
        },
        pinned=None,
        fallback="none",
        ttl_s=30.0,
        on_controller_loss=OnControllerLoss.HOLD_LAST_GOOD,
        prior_bytes_per_s=125e6,
        hysteresis=0.03,
    )


if __name__ == "__main__":
    main()
