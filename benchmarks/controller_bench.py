"""The controller against fixed profiles, the paper's controllers and an oracle, in replay: ``make bench-controller``.

Each scenario of `controller_scenarios` is replayed under each policy with the same truth. All times are simulated;
the code that decides is the real one (`controller_kvserve`). It says how long it will take, prints a table, or JSON
with ``--json``, writes ``build/bench/controller.json`` and draws ``docs/figures/controller.png``. ``QUICK=1`` takes
at most two minutes: one seed, shorter scenarios, traces from the sample beside this file; it leaves the committed
figure alone.

`controller_quality` adds scenarios in which quality is maximised under an objective; they enter no regret.

The whole traces are looked for in ``--data``; `controller_traces.SOURCES` says where they come from.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import controller_quality as quality
from controller_kvserve import KVServe
from controller_policies import DynamicController, LegacyController, Static, oracle
from controller_replay import Decider, Run, replay
from controller_scenarios import Scenario, scenarios
from controller_traces import FILES, Traces, missing, read, sampled

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "build" / "bench"
FIGURE: Final = ROOT / "docs" / "figures" / "controller.png"
DATA: Final = ROOT.parent / "shared" / "data"
"""Beside the repository, not part of it; only benchmarks know of it."""
SEEDS: Final = 5
QUICK_SEED_S: Final = 50.0
SEED_S: Final = 150.0
KVSERVE: Final = "kvserve"
ORACLE: Final = "oracle"
LEGACY: Final = "paper-legacy"
STRICT: Final = "paper-legacy-within-budget"
DYNAMIC: Final = "paper-dynamic"
ABLATIONS: Final[Mapping[str, Mapping[str, bool]]] = {
    "kvserve-no-bandit": {"bandit": False},
    "kvserve-no-residuals": {"residuals": False},
    "kvserve-no-backlog": {"backlog": False},
}
MOST_REGRET: Final = 0.05
LEAST_GAIN: Final = 1.95
MOST_OVER_RAW: Final = 0.02
VISIBLE: Final = 1.05
"""An ablation is visibly worse where it takes at least so many times as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One scenario under all policies, with one truth.

    Attributes:
        name: Of the scenario.
        default: The profile that is used without a controller.
        runs: By policy; fixed profiles are ``static-NAME``, raw is ``raw``.
    """

    name: str
    default: str
    runs: dict[str, Run]


def run_all(scenario: Scenario, seed: int) -> Result:
    """Replay a scenario under all policies."""
    statics = {name: replay(scenario, Static(name)) for name in scenario.profiles}
    deciders: dict[str, Callable[[], Decider]] = {
        LEGACY: lambda: LegacyController(scenario, seed, strict=False),
        STRICT: lambda: LegacyController(scenario, seed, strict=True),
        DYNAMIC: lambda: DynamicController(scenario),
        KVSERVE: lambda: KVServe(scenario),
    }
    for name, switches in ABLATIONS.items():
        deciders[name] = lambda switches=switches: KVServe(scenario, **switches)  # type: ignore[misc]
    runs = {"raw": statics["none"]}
    runs |= {f"static-{name}": run for name, run in statics.items() if name != "none"}
    runs |= {name: replay(scenario, make()) for name, make in deciders.items()}
    runs[ORACLE] = oracle(scenario, statics)
    return Result(name=scenario.name, default=f"static-{scenario.default}", runs=runs)


def run_seed(traces: Traces, seed: int, quick: bool) -> list[Result]:
    """Replay all scenarios of a seed."""
    return [run_all(scenario, seed) for scenario in scenarios(traces, seed, quick=quick)]


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return the figures of one scenario over its seeds.

    Means and 95th percentiles are those of all transfers together; the best fixed profile is chosen in hindsight for
    each seed, among raw and those that never exceed the quality budget.
    """
    policies = {
        name: {
            "mean_s": _mean(result.runs[name] for result in results),
            "p95_s": float(
                np.percentile(np.concatenate([r.runs[name].total_s for r in results]), 95)
            ),
            "violations": sum(result.runs[name].violations for result in results),
        }
        for name in results[0].runs
    }
    best = [_best_static(result) for result in results]
    kvserve_s = policies[KVSERVE]["mean_s"]
    return {
        "name": results[0].name,
        "policies": policies,
        "regret": kvserve_s / policies[ORACLE]["mean_s"] - 1,
        "vs_static_default": policies[results[0].default]["mean_s"] / kvserve_s,
        "vs_best_static": _mean(best) / kvserve_s,
        "raw_is_best": all(
            run is result.runs["raw"] for run, result in zip(best, results, strict=True)
        ),
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is claimed of the controller, with the figure and whether it holds."""
    paper = next(row for row in rows if row["name"] == "paper-60s")
    kvserve_s = paper["policies"][KVSERVE]["mean_s"]
    # as it is, its legacy controller exceeds the quality budget, and is no competitor
    rival = min((STRICT, DYNAMIC), key=lambda name: float(paper["policies"][name]["mean_s"]))
    rival_s = paper["policies"][rival]["mean_s"]
    raw = [row for row in rows if row["raw_is_best"]]
    over_raw = max((_over_raw(row) for row in raw), default=0.0)
    broken = sum(row["policies"][KVSERVE]["violations"] for row in rows)
    regret = float(np.mean([row["regret"] for row in rows]))
    found = [
        _claim("mean regret to the oracle", regret, f"<= {MOST_REGRET:g}", regret <= MOST_REGRET),
        _claim(
            "paper's trace: static default over KVServe",
            paper["vs_static_default"],
            f">= {LEAST_GAIN:g}",
            paper["vs_static_default"] >= LEAST_GAIN,
        ),
        _claim(
            f"paper's trace: the paper's better controller within budget ({rival}) over KVServe",
            rival_s / kvserve_s,
            ">= 1",
            rival_s >= kvserve_s,
        ),
        _claim(
            f"most over raw where raw is best ({len(raw)} scenarios)",
            over_raw,
            f"<= {MOST_OVER_RAW:g}",
            over_raw <= MOST_OVER_RAW,
        ),
        _claim("transfers beyond the quality budget", broken, "0", broken == 0),
    ]
    for name in ABLATIONS:
        worst = max(rows, key=lambda row, name=name: _ratio(row, name))  # type: ignore[misc]
        ratio = _ratio(worst, name)
        text = f"{name} over KVServe, at worst ({worst['name']})"
        found.append(_claim(text, ratio, f">= {VISIBLE:g}", ratio >= VISIBLE))
    return found


def _claim(text: str, value: float, target: str, holds: bool) -> dict[str, Any]:
    return {"claim": text, "value": float(value), "target": target, "holds": bool(holds)}


def _ratio(row: Mapping[str, Any], name: str) -> float:
    policies = row["policies"]
    return float(policies[name]["mean_s"] / policies[KVSERVE]["mean_s"])


def _over_raw(row: Mapping[str, Any]) -> float:
    policies = row["policies"]
    return float(policies[KVSERVE]["mean_s"] / policies["raw"]["mean_s"] - 1)


def _best_static(result: Result) -> Run:
    fixed = [
        run
        for name, run in result.runs.items()
        if (name == "raw" or name.startswith("static-")) and not run.violations
    ]
    return min(fixed, key=lambda run: run.mean_s)


def _mean(runs: Iterable[Run]) -> float:
    return float(np.mean(np.concatenate([run.total_s for run in runs])))


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what is printed: mean seconds, and in how many of them KVServe's are better."""
    drawn = Table(
        box=SIMPLE_HEAD,
        title="mean seconds of a transfer (marked * beyond the quality budget), and times KVServe's",
    )
    drawn.add_column("scenario", no_wrap=True)
    columns = ("raw", "default", "best fixed", "legacy", "in budget", "dynamic")
    ours = ("KVServe", "oracle", "regret", "no bandit", "no resid.", "no backlog")
    for heading in (*columns, *ours):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        policies = row["policies"]
        kvserve_s = policies[KVSERVE]["mean_s"]
        papers = (
            f"{policies[name]['mean_s']:.3f}{'*' if policies[name]['violations'] else ''}"
            for name in (LEGACY, STRICT, DYNAMIC)
        )
        drawn.add_row(
            row["name"],
            f"{policies['raw']['mean_s']:.3f}",
            f"{row['vs_static_default'] * kvserve_s:.3f}",
            f"{row['vs_best_static'] * kvserve_s:.3f}",
            *papers,
            f"{kvserve_s:.3f}",
            f"{policies[ORACLE]['mean_s']:.3f}",
            f"{row['regret']:.1%}",
            *(f"{_ratio(row, name):.2f}" for name in ABLATIONS),
        )
    return drawn


def claim_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Return the claims as they are printed."""
    drawn = Table(box=SIMPLE_HEAD)
    for heading in ("claim", "value", "target", "holds"):
        drawn.add_column(heading, justify="left" if heading == "claim" else "right")
    for one in found:
        holds = "yes" if one["holds"] else "no"
        drawn.add_row(one["claim"], f"{one['value']:.4g}", one["target"], holds)
    return drawn


def traces_of(folder: Path, *, quick: bool) -> Traces:
    """Return the whole traces of a folder, or the sample, and say which and why."""
    if quick:
        return sampled()
    if lacking := missing(folder):
        _say(f"{folder} lacks {', '.join(lacking)}: the sample in the repository serves instead")
        _say(f"the whole run needs there: {', '.join(FILES.values())}; see controller_traces.py")
        return sampled()
    return read(folder)


def measure(folder: Path, *, quick: bool, seeds: int, jobs: int) -> dict[str, Any]:
    """Replay everything and return the document."""
    start_s = time.perf_counter()
    traces = traces_of(folder, quick=quick)
    about_s = (QUICK_SEED_S if quick else SEED_S) * seeds / jobs
    _say(f"{seeds} seeds by {jobs} processes: about {max(1, round(about_s / 60))} min")
    numbers = range(1, seeds + 1)
    if jobs == 1:
        by_seed = [run_seed(traces, seed, quick) for seed in numbers]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            waiting = [pool.submit(run_seed, traces, seed, quick) for seed in numbers]
            by_seed = [one.result() for one in waiting]
    rows = [summary(results) for results in zip(*by_seed, strict=True)]
    kept = [quality.run_seed(seed, quick=quick) for seed in numbers]
    _say(f"done after {time.perf_counter() - start_s:.0f} s")
    return {
        "scenarios": rows,
        "quality": [quality.summary(name, [each[name] for each in kept]) for name in kept[0]],
        "mean_regret": float(np.mean([row["regret"] for row in rows])),
        "claims": claims(rows),
        "seeds": seeds,
        "quick": quick,
        "whole_traces": traces.complete,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Replay, print, draw and write; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the whole traces")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--seeds", type=int, help=f"by default {SEEDS}, or 1 quickly")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    seeds = options.seeds or (1 if quick else SEEDS)
    document = measure(options.data, quick=quick, seeds=seeds, jobs=options.jobs)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "controller.json").write_text(json.dumps(document, indent=2) + "\n")
    from controller_figure import draw  # matplotlib is slow to import

    figure = OUT / "controller-quick.png" if quick else FIGURE
    draw(document, traces_of(options.data, quick=True), figure)
    if options.json:
        print(json.dumps({"scenarios": document["scenarios"]}))
    else:
        console = Console(width=190)
        console.print(table(document["scenarios"]))
        console.print(quality.table(document["quality"]))
        console.print(claim_table(document["claims"]))
    return 0 if all(claim["holds"] for claim in document["claims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
