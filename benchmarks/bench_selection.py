"""How long the connector takes to choose a profile for one transfer: the target is below 20 µs at the 99th percentile.

Run it with ``python benchmarks/bench_selection.py [--json]``; it takes a few seconds.
"""

import argparse
import gc
import json
import time

import numpy as np

from kvserve_api.latency import Link, Load, StageCost
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
from kvserve_connector.selector import ReadyTable, Selector
from kvserve_strategies import PRESETS

ROUNDS = 50_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    as_json = parser.parse_args().json

    selector = Selector()
    selector.install(ReadyTable.of(_full_table()))
    stages, bundles = known_stages(), frozenset({"sha256:" + "0" * 64})
    load = Load(arrivals_per_s=0.5, native_bytes_per_s=1e7)
    link = Link(
        bytes_per_s=6.25e6,
        backlog_bytes=1e6,
        rtt_s=1e-4,
        encode_backlog_s=0.01,
        decode_backlog_s=0.01,
        load=load,
        encoder_load=load,
    )
    # processor time beside wall time: the second counts every other process of a busy machine too
    wall_ns, cpu_ns = np.empty(ROUNDS, np.int64), np.empty(ROUNDS, np.int64)
    gc.disable()
    for index in range(-1000, ROUNDS):
        start_ns, start_cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        selector.choose(
            "default",
            native_bytes=20_000_000 + index,
            link=link,
            chunks=6,
            stages=stages,
            bundles=bundles,
            peer="10.0.0.1",
        )
        cpu_ns[index] = time.thread_time_ns() - start_cpu_ns
        wall_ns[index] = time.perf_counter_ns() - start_ns
    result: dict[str, float] = {"rounds": ROUNDS, "candidates": MAX_CANDIDATES}
    for name, times_ns in (("wall", wall_ns), ("cpu", cpu_ns)):
        for percent in (50, 99):
            result[f"{name}_p{percent}_us"] = float(np.percentile(times_ns, percent)) / 1e3
    if as_json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{name} {value:.1f}" for name, value in result.items()))


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
