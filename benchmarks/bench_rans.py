"""How fast the entropy coder is on one core, by instruction set, beside constriction and a copy of memory.

Run it with ``python benchmarks/bench_rans.py [--json]``; it takes about a minute (``QUICK=1``: 15 seconds) and writes
``build/bench/rans.json``. A symbol is one int16 level. "Coder" is rANS alone, tables made before; "ladder" is all
that ``code.ladder.v1`` does with levels by channel: choice of tables, coding, bytes of a section.

Data: 30 % or 70 % of the channels are dead (one value in about 3,000 is not 0), the rates of the others fall from 5 to
.1 bits a symbol, as in a transform's spectrum. The least of many short runs is taken, and all runs of one line follow
each other: on a machine with other work, ratios within a line count.
"""

import argparse
import importlib
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels import rans
from kvserve_kernels.native import Simd, coder
from kvserve_kernels.rans.values import Tables
from kvserve_strategies.ladder import decode_levels, encode_levels

TOKENS, CHANNELS, GROUPS = 1024, 1152, 4
SECONDS = 0.3 if os.environ.get("QUICK") else 1.5
OUTPUT = Path(__file__).parents[1] / "build" / "bench" / "rans.json"


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    rows = [row for dead in (0.3, 0.7) for row in _measure(dead)]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=2) + "\n")
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['dead']:.0%} dead  {row['what']:<22} "
            + ("not installed" if row["encode_gsym_s"] is None else _figures(row))
        )


def _figures(row: dict[str, Any]) -> str:
    bits = "" if row["bits"] is None else f"   {row['bits']:.3f} bits a symbol"
    return f"encode {row['encode_gsym_s']:6.2f}   decode {row['decode_gsym_s']:6.2f} Gsym/s{bits}"


def _measure(dead: float) -> list[dict[str, Any]]:
    levels = _levels(dead)
    rows = [_row(dead, "copy of memory", levels, levels.copy, levels.copy, None)]
    ids = rans.assign(levels, rans.MAX_TABLES)
    tables = Tables.of(rans.build(levels, ids))
    for name in _instruction_sets():
        os.environ["KVSERVE_SIMD"] = name
        coded = rans.encode_values(levels, ids, tables, GROUPS)
        size = 8 * (
            sum(state.nbytes for state in coded.states)
            + sum(words.nbytes for words in coded.words)
            + coded.planes.nbytes
            + coded.escapes.nbytes
        )
        rows.append(
            _row(
                dead,
                f"coder, {name}",
                levels,
                partial(rans.encode_values, levels, ids, tables, GROUPS),
                partial(rans.decode_values, coded, ids, tables, GROUPS, TOKENS),
                size / levels.size,
            )
        )
        section = np.frombuffer(b"".join(p.tobytes() for p in encode_levels(levels)), np.uint8)
        rows.append(
            _row(
                dead,
                f"ladder, {name}",
                levels,
                partial(encode_levels, levels),
                partial(decode_levels, section, CHANNELS, TOKENS),
                8 * section.nbytes / levels.size,
            )
        )
    rows.append(_constriction(dead, levels, ids, tables))
    return rows


def _row(
    dead: float,
    what: str,
    levels: NDArray[np.int16],
    encode: Callable[[], object],
    decode: Callable[[], object],
    bits: float | None,
) -> dict[str, Any]:
    return {
        "dead": dead,
        "what": what,
        "encode_gsym_s": levels.size / _best_ns(encode),
        "decode_gsym_s": levels.size / _best_ns(decode),
        "bits": bits,
    }


def _best_ns(run: Callable[[], object]) -> int:
    run()
    best, stop = 1 << 62, time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter_ns()
        run()
        best = min(best, time.perf_counter_ns() - start)
    return best


def _instruction_sets() -> list[str]:
    library = coder()
    widest = Simd.NUMBA if library is None else Simd(library.kvserve_widest())
    return [level.name.lower() for level in sorted(Simd, reverse=True) if level <= widest]


def _constriction(
    dead: float, levels: NDArray[np.int16], ids: NDArray[np.uint8], tables: Tables
) -> dict[str, Any]:
    """Measure constriction's ANS coder with the same tables on a quarter of the channels."""
    try:
        stream = importlib.import_module("constriction").stream
    except ImportError:
        print("constriction is not installed: pip install constriction==0.5.0")
        return {
            "dead": dead, "what": "constriction", "encode_gsym_s": None, "decode_gsym_s": None,
            "bits": None,
        }  # fmt: skip
    part = np.arange(0, CHANNELS, 4)
    symbols = rans.split(levels, ids, tables.models)[0].astype(np.int32)
    models = [
        stream.model.Categorical(np.maximum(row, 1e-9) / 4096, perfect=False)
        for row in tables.frequencies.astype(np.float64)
    ]

    def encode() -> Any:
        made = stream.stack.AnsCoder()
        for c in part[::-1]:
            made.encode_reverse(symbols[c], models[ids[c]])
        return made.get_compressed()

    words = encode()

    def decode() -> None:
        made = stream.stack.AnsCoder(words)
        for c in part:
            made.decode(models[ids[c]], TOKENS)

    return _row(dead, "constriction", levels[part], encode, decode, None)


def _levels(dead: float) -> NDArray[np.int16]:
    """Return ``[channels, tokens]`` of two-sided geometric levels."""
    rng = np.random.default_rng(0)
    live = CHANNELS - int(CHANNELS * dead)
    rates = np.concatenate([np.linspace(5, 0.1, live), np.full(CHANNELS - live, 0.004)])
    ratios = np.array([_ratio(float(rate)) for rate in np.unique(rates)])[
        np.unique(rates, return_inverse=True)[1]
    ]
    magnitudes = rng.geometric(1 - ratios[:, None], (CHANNELS, TOKENS)) - 1
    other = rng.geometric(1 - ratios[:, None], (CHANNELS, TOKENS)) - 1
    return (magnitudes - other).astype(np.int16)


def _ratio(bits: float) -> float:
    """Return the ratio of a two-sided geometric distribution of a given entropy."""
    low, high = 1e-7, 0.999
    for _ in range(60):
        middle = math.sqrt(low * high)
        p = middle ** np.abs(np.arange(-200, 201)) * (1 - middle) / (1 + middle)
        p = p[p > 1e-300]
        low, high = (middle, high) if float(-(p * np.log2(p)).sum()) < bits else (low, middle)
    return low


if __name__ == "__main__":
    main()
