"""How fast the linear transform runs on one core, each way, by width of its groups; and beside it, memcpy.

Run it with ``python benchmarks/bench_transform.py [--quick]``. The cache is that of SmolLM2-135M: 30 layers, 3 heads of
64, keys and values together, bfloat16. Rates count the bytes of that cache. On a busy machine only the ratio to
memcpy, measured in turn with the rest, means much. Results go to ``build/bench/transform.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvserve_kernels import hadamard, rotate
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.linear import Group, Plan, linear_native, portable
from kvserve_kernels.linear.linear_native import Level

LAYERS, HEADS, DIM = 30, 3, 64
# values of a token in one group: layers, heads (0: all) and live components
WIDTHS = {128: (1, 1, 70), 1152: (3, 0, 600), 3840: (10, 0, 1700)}
OUT = Path("build/bench/transform.json")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--portable", action="store_true", help="measure numba and BLAS too")
    arguments = parser.parse_args()
    tokens, rounds = (256, 3) if arguments.quick else (1024, 11)

    rng = np.random.default_rng(0)
    native = narrow(
        rng.standard_normal((2 * LAYERS, tokens, HEADS, DIM)).astype(np.float32), np.uint16
    )
    inv_freq = 10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    tables = rotate.tables(inv_freq, 1.0, 4, tokens)
    cos, sin = (table[None] for table in tables)
    copy, real = np.empty_like(native), np.empty(native.shape, np.float32)
    jobs: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: np.copyto(copy, native),
        "unrotate": lambda: rotate.unrotate(native[:LAYERS], *tables, False),
        "rotate": lambda: rotate.rotate(real[:LAYERS], *tables, False, np.uint16),
        "hadamard": lambda: hadamard.hadamard(native.reshape(-1, DIM)),
        "restore": lambda: hadamard.restore(real.reshape(-1, DIM), np.uint16),
    }
    widest = linear_native.level()
    kinds = [level for level in Level if Level.NONE < level <= widest]
    for width, (layers, heads, components) in WIDTHS.items():
        plan = _plan(rng, layers, heads or HEADS, components)
        levels = portable.forward(native, plan, cos, sin, False)
        assert levels is not None
        if arguments.portable or widest == Level.NONE:
            jobs[f"forward {width} portable"] = partial(
                portable.forward, native, plan, cos, sin, False
            )
            jobs[f"inverse {width} portable"] = partial(
                portable.inverse, levels, plan, cos, sin, False, copy
            )
        for kind in kinds:
            name = f"{width} {kind.name.lower()}"
            jobs[f"forward {name}"] = partial(
                linear_native.forward, native, plan, cos, sin, False, kind
            )
            jobs[f"inverse {name}"] = partial(
                linear_native.inverse, levels, plan, cos, sin, False, copy, kind
            )

    for job in jobs.values():
        job()
    times_s: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start_s = time.thread_time()
            job()
            times_s[name].append(time.thread_time() - start_s)

    results = {}
    memcpy_s = np.array(times_s["memcpy"])
    for name, all_s in times_s.items():
        share = 0.5 if name in ("unrotate", "rotate") else 1.0
        rates = share * native.nbytes / np.array(all_s) / 1e9
        ratio = float(np.median(share * memcpy_s / np.array(all_s)))
        low, median, high = (float(np.percentile(rates, q)) for q in (10, 50, 90))
        results[name] = {"gb_per_s": median, "p10": low, "p90": high, "of_memcpy": ratio}
        print(f"{name:28} {median:6.2f} GB/s ({low:.2f} to {high:.2f}), {ratio:.3f} of memcpy")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    about = {"tokens": tokens, "rounds": rounds, "level": widest.name.lower(), "results": results}
    OUT.write_text(json.dumps(about, indent=2) + "\n")


def _plan(rng: np.random.Generator, layers: int, heads: int, components: int) -> Plan:
    """Return a plan with groups of so many layers and heads, keys and values joined."""
    groups = []
    for first in range(0, LAYERS, layers):
        for head in range(0, HEADS, heads):
            block = np.arange(first, first + layers)
            rows = np.repeat(np.concatenate([block, block + LAYERS]), heads).astype(np.int32)
            width = rows.size * DIM
            groups.append(
                Group(
                    rows=rows,
                    heads=np.tile(np.arange(head, head + heads), 2 * layers).astype(np.int32),
                    rotations=np.where(rows < LAYERS, 0, -1).astype(np.int32),
                    mean=rng.standard_normal(width).astype(np.float32),
                    inv_scale=np.full(width, 127 / 5, np.float32),
                    matrix=rng.integers(-127, 128, (components, width), dtype=np.int8),
                    factor=np.full(components, 2e-4 / width**0.5, np.float32),
                    offset=np.full(components, 0.46, np.float32),
                    delta=np.full(components, -0.03, np.float32),
                    inverse=(rng.standard_normal((components, width)) / width).astype(np.float32),
                )
            )
    return Plan(groups=tuple(groups), dim=DIM)


if __name__ == "__main__":
    main()
