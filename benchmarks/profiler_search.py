"""KVServe's profiling engine beside other searches, replayed on the measured truth: ``make bench-profiler``.

It prints one table, draws the convergence, and writes ``build/bench/profiler.json``; ``--json`` prints that instead.
One evaluation is one measurement of a strategy's quality on all windows of both texts. ``QUICK=1`` takes at most two
minutes, with fewer seeds and evaluations, and leaves the committed figure alone. A run that was stopped goes on where
it was when it is started again, as long as table and code are the same.

The score is the hypervolume of (ratio, loss, codec time) in octaves over a reference point that is worth nothing: no
compression, a loss of a policy's default budget, the slowest codec of the space. It is a share of what all strategies
dominate together, mean of the texts.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Printed

from kvserve_api.errors import KVServeError
from kvserve_profiler.cli import DEFAULT_MAX_LOSS_BP
from kvserve_profiler.exits import last_words
from kvserve_profiler.pool import Pool
from kvserve_profiler.quality import BASIS_POINTS
from kvserve_profiler.screening import structure_of
from kvserve_profiler.sensitivity import MOST_NATS
from profiler_curves import TARGET, Outcome, Scoring
from profiler_figure import draw
from profiler_kept import Kept, Replay
from profiler_methods import METHODS, SHARE, Problem, replay
from profiler_table import Table

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = ROOT / "benchmarks" / "data" / "profiler-truth.csv"
OUT: Final = ROOT / "build" / "bench"
FIGURE: Final = ROOT / "docs" / "figures" / "profiler-convergence.png"
BUDGET_BP: Final = float(DEFAULT_MAX_LOSS_BP)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for a search.

    Attributes:
        seeds: Runs.
        evaluations: Of each, at most; 0 for as many as there are strategies.
        evaluation_s: About how long one takes here, in seconds, for what is said before.
    """

    seeds: int
    evaluations: int
    evaluation_s: float


WHOLE: Final = {
    "random": Effort(10, 0, 0.003),
    "Sobol": Effort(10, 1000, 0.005),
    "NSGA-II": Effort(10, 400, 0.01),
    "KVServe paper": Effort(10, 100, 0.15),
    "KVServe, no forecasts": Effort(10, 65, 0.5),
    "KVServe, sampled": Effort(10, 80, 0.1),
    "KVServe": Effort(10, 120, 0.2),
}
QUICK: Final = {
    "random": Effort(3, 0, 0.003),
    "Sobol": Effort(3, 500, 0.005),
    "NSGA-II": Effort(3, 200, 0.01),
    "KVServe paper": Effort(2, 65, 0.1),
    "KVServe, no forecasts": Effort(1, 65, 0.5),
    "KVServe, sampled": Effort(3, 65, 0.05),
    "KVServe": Effort(3, 65, 0.1),
}


def main() -> int:
    """Replay, print, draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=TABLE, help="what was measured")
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")
    arguments = parser.parse_args()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    try:
        table = Table.read(arguments.table)
        kept = Kept.of(OUT / "profiler-replays.jsonl", [arguments.table, *_sources()])
        document, outcomes = run(table, kept, quick=quick)
    except (KVServeError, OSError) as error:
        print(f"profiler_search: {last_words(error)}", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "profiler.json").write_text(json.dumps(document, indent=2) + "\n")
    figure = OUT / "profiler-convergence.png" if quick else FIGURE
    title = (
        f"{document['model']}: {document['space']:,} strategies, median and quartiles of the seeds"
    )
    draw(
        outcomes,
        space=document["space"],
        budget=document["budget"],
        title=title,
        path=figure,
    )
    kept.forget()
    if arguments.json:
        print(json.dumps(document))
    else:
        Console(width=120).print(printed(document))
        _say(f"{OUT / 'profiler.json'} and {figure}")
    return 0


def run(table: Table, kept: Kept, *, quick: bool) -> tuple[dict[str, Any], list[Outcome]]:
    """Replay every search and return what it came to, as JSON and for the figure."""
    efforts = QUICK if quick else WHOLE
    problem, losses_bp, scoring = problem_of(table)
    count = len(table.points)
    about_s = sum(
        effort.seeds * (effort.evaluations or count) * effort.evaluation_s
        for effort in efforts.values()
    )
    _say(f"{count} strategies, {len(efforts)} searches: about {max(about_s / 60, 1):.0f} min")
    outcomes = []
    for name, effort in efforts.items():
        outcomes.append(measure(name, effort, problem, losses_bp, scoring, kept))
        _say(f"{name}: {effort.seeds} seeds done")
    evaluation_s = float(table.evaluation_s.mean())
    return document_of(table, scoring, outcomes, evaluation_s), outcomes


def problem_of(table: Table) -> tuple[Problem, NDArray[np.float64], Scoring]:
    """Return a table as a problem, the losses of each text and window, and what judges searches.

    Returns:
        The losses are ``[points, texts, windows]`` in basis points.
    """
    kinds = list(dict.fromkeys(table.kinds))
    of_kind = [[at for at, kind in enumerate(table.kinds) if kind == text] for text in kinds]
    windows = np.stack([table.kl.mean(axis=2)[:, chosen] for chosen in of_kind], axis=1)
    presets = set(table.space.presets().values())
    pool = Pool(
        features=table.space.features(table.points),
        ratio=table.ratio,
        codec_s=codec_times(table),
        starts=np.array([point in presets for point in table.points]),
    )
    problem = Problem(
        space=table.space,
        points=table.points,
        pool=pool,
        texts=len(kinds),
        budget_bp=BUDGET_BP,
        forecast_bp=np.expm1(
            np.stack([table.forecast[:, chosen] for chosen in of_kind], axis=1).clip(0, MOST_NATS)
        )
        * BASIS_POINTS,
    )
    truth = np.expm1(windows.mean(axis=2)) * BASIS_POINTS
    return problem, np.expm1(windows) * BASIS_POINTS, Scoring(pool, truth, BUDGET_BP)


def codec_times(table: Table) -> NDArray[np.float64]:
    """Return encoding and decoding seconds, by structure as the engine's screening has them: ``[points]``.

    A single timing is off by more than strategies of one structure differ, and the luckiest would make the front.
    """
    encode_s: dict[str, float] = {}
    decode_s: dict[str, float] = {}
    structures = [structure_of(table.space.strategy(point)) for point in table.points]
    for structure, encoding_s, decoding_s in zip(
        structures, table.encode_s, table.decode_s, strict=True
    ):
        encode_s[structure] = min(encoding_s, encode_s.get(structure, encoding_s))
        decode_s[structure] = min(decoding_s, decode_s.get(structure, decoding_s))
    return np.array([encode_s[structure] + decode_s[structure] for structure in structures])


def measure(
    name: str,
    effort: Effort,
    problem: Problem,
    losses_bp: NDArray[np.float64],
    scoring: Scoring,
    kept: Kept,
    clock: Callable[[], float] = time.thread_time,
) -> Outcome:
    """Replay one search with each of its seeds, if it was not."""
    most = effort.evaluations or len(problem.points)
    replays = []
    for seed in range(effort.seeds):
        done = kept.find(name, seed, most)
        if done is None:
            start_s = clock()
            order = list(replay(METHODS[name](problem, seed), losses_bp, most))
            spent_s = clock() - start_s
            curve = scoring.curve(order).tolist()
            done = Replay(name=name, seed=seed, most=most, curve=curve, spent_s=spent_s)
            kept.add(done)
        replays.append(done)
    evaluations = sum(len(done.curve) for done in replays)
    return Outcome(
        name=name,
        curves=tuple(np.array(done.curve) for done in replays),
        suggest_s=sum(done.spent_s for done in replays) / evaluations,
    )


def document_of(
    table: Table, scoring: Scoring, outcomes: list[Outcome], evaluation_s: float
) -> dict[str, Any]:
    """Return the result as JSON."""
    count = len(table.points)
    ours = next(outcome for outcome in outcomes if outcome.name == "KVServe")
    needed = ours.evals_to_target
    return {
        "model": table.provenance["model"]["name"],
        "space": count,
        "budget": count // SHARE,
        "exhaustive_hv": float(scoring.exhaustive.mean()),
        "reference": {"ratio": 1, "loss_bp": BUDGET_BP, "codec": "the slowest of the space"},
        "evaluation_s": evaluation_s,
        "methods": [outcome.to_json(count // SHARE) for outcome in outcomes],
        "all_knowing": scoring.all_knowing(TARGET),
        "reduction": None if needed is None else count / needed,
        "overhead": ours.suggest_s / evaluation_s,
    }


def printed(document: dict[str, Any]) -> Printed:
    """Return the result as a table."""
    table = Printed(
        title=f"{document['model']}: {document['space']:,} strategies, two texts",
        box=SIMPLE_HEAD,
        caption=_caption(document),
    )
    table.add_column("search")
    for column in (
        f"evaluations to {TARGET:.0%}",
        f"hypervolume at {document['budget']}, %",
        "quartiles",
        "suggestion, s",
    ):
        table.add_column(column, justify="right")
    for method in document["methods"]:
        share = {key: f"{100 * value:.1f}" for key, value in method["hv_at_budget"].items()}
        needed = method["evals_to_98"]
        table.add_row(
            method["name"],
            "not reached" if needed is None else f"{needed:g}",
            share["p50"],
            f"{share['p25']}–{share['p75']}",
            f"{method['suggest_s']:.3f}",
        )
    return table


def _caption(document: dict[str, Any]) -> str:
    reduction = document["reduction"]
    found = "target not reached" if reduction is None else f"{reduction:.0f}× fewer evaluations"
    return (
        f"at least {document['all_knowing']} are needed; KVServe: {found}; "
        f"suggesting takes {document['overhead']:.0%} of an evaluation's time"
    )


def _sources() -> list[Path]:
    """Return the files of the code that decides what searches measure."""
    folders = (ROOT / "profiler" / "kvserve_profiler", ROOT / "benchmarks")
    return [
        path
        for folder, name in zip(folders, ("*.py", "profiler_*.py"), strict=True)
        for path in sorted(folder.glob(name))
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
