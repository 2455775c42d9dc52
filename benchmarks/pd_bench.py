"""Real prefill and decode engines over links of many rates, under raw, fixed profiles and KVServe: ``make bench-pd``.

Two vLLM servers with SmolLM2-135M-Instruct, a core and a thread each, live in network namespaces; what they exchange
passes a link whose rate is set with htb (`pd_links`, needs root). Real prompts of 500 to 2,000 tokens arrive as a
Poisson process whatever became of those before, the same at the same times for every policy; time to first token and
job completion time are what the client sees, bytes what passed the link. Policies are

* ``raw``, and fixed profiles (pinned by the controller): presets as `pd_profiles` measures them;
* ``kvserve``: the real controller decides from their front, learns online, and minimises latency;
* ``kvserve-quality``: it maximises quality under an objective;
* ``alone``: the prefill engine does all of a request, the bound.

Both engines are asked at once, and the decode engine pulls while the prefill goes on; policies that are marked ``after
prefill`` ask the decode engine when the prefill has ended, as routers in NIXL's way do.

Policies take turns, with the same requests in each round, and are compared request by request. A prefill is measured
again all the time: loads, and the link of the paper's regime, follow from what it takes then. ``--minutes N`` gives the
time there is, which decides how many rounds there are, and ``--only NAME`` measures one link alone. It prints tables,
or JSON with ``--json``, writes ``build/bench/pd.json`` and draws ``docs/figures/pd.png``; ``--markdown`` prints the
tables of ``docs/benchmarks.md`` from that file instead. ``QUICK=1`` takes two minutes, besides the engines' start:
fewer links, policies and requests; it leaves the committed figure alone. The first run calibrates the model and
measures the profiles, which takes six minutes more, once.

Prompts are made of the project's data folder (WikiText-2 test, HumanEval, GSM8K test; ``--texts``); where it is not, of
the profiler's built-in corpus.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from rich.console import Console

import pd_claims
import pd_links
import pd_load
import pd_markdown
import pd_model
import pd_profiles
import pd_rows
import pd_servers
from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.profile_set import DEFAULT_CLASS
from pd_options import OUT, ROOT, parser
from pd_plan import START_S, plan
from pd_run import BUDGET_BP, OBJECTIVE_S, Clock, Run, compare
from pd_tables import claim_table, machine, model_table, run_table

FIGURE: Final = ROOT / "docs" / "figures" / "pd.png"
DOCUMENT: Final = OUT / "pd.json"
MINUTES: Final = 25.0
QUICK_MINUTES: Final = 2.0
NOTES: Final = (
    "LMCache's multi-process connector is not among the policies: it needs an environment of its own (its wheel wants"
    " CUDA, its pins exclude vLLM's), which this benchmark does not make.",
    "One core an engine: encoding competes with prefill, decoding with generation.",
)


def measure(options: argparse.Namespace, *, quick: bool) -> dict[str, Any]:
    """Do all that ``make bench-pd`` does, and return the document."""
    planned = plan(options.minutes, quick=quick)
    conditions = [one for one in planned if options.only in (None, one.name)]
    if not conditions:
        names = ", ".join(one.name for one in planned)
        raise SpecError("--only", f"must be one of {names}, got {options.only!r}")
    start_s = time.perf_counter()
    model = (options.model or pd_profiles.model_folder()).resolve()
    pareto = pd_profiles.measured(model, options.bundle, options.cache)
    documents = pd_load.tokens(pd_load.texts(options.texts), model)
    if not options.texts.is_dir():
        _say(f"no {options.texts}: prompts are made of the built-in corpus")
    _say(f"about {options.minutes:.0f} min, and {START_S:.0f} s for the engines' start")
    rows: list[dict[str, Any]] = []
    notes = list(NOTES)
    with (
        pd_links.laid() as link,
        pd_servers.running(
            link, model, pd_profiles.artifacts(options.cache), OUT / "pd-logs"
        ) as pair,
    ):
        run = Run(pair, pareto, documents)
        clock = Clock(starts_s=time.perf_counter(), budget_s=options.minutes * 60)
        _say(f"the engines run after {clock.starts_s - start_s:.0f} s; logs: {OUT / 'pd-logs'}")
        generate_s = run.warm_up()
        for row in compare(run, conditions, clock, notes, _say):
            rows.append(row)
            _say(_line(row) + f"  [{time.perf_counter() - start_s:.0f} s]")
        lossy = run.lossy()
    prefill_s_per_token = median(probe.s_per_token for probe in run.probes)
    return {
        "runs": rows,
        "vs_raw": pd_rows.vs_raw(rows),
        "vs_best_static": pd_rows.vs_best_static(rows, lossy),
        "claims": pd_claims.claims(rows, lossy),
        "overlap": pd_claims.overlap(rows),
        "modelled": pd_model.modelled(rows, pareto, generate_s=generate_s),
        "profiles": [
            {
                "name": p.name,
                "ratio": p.ratio,
                "loss_bp": p.loss_bp,
                "loss_upper_bp": p.loss_upper_bp,
            }
            for p in pareto.classes[DEFAULT_CLASS]
        ],
        "budget_bp": BUDGET_BP,
        "objective_s": OBJECTIVE_S,
        "beyond_budget": lossy,
        "machine": machine(),
        "prefill_s_per_token": prefill_s_per_token,
        "probes": [
            {"at_s": probe.at_s - clock.starts_s, "prefill_s_per_token": probe.s_per_token}
            for probe in run.probes
        ],
        "generate_s": generate_s,
        "measured_s": time.perf_counter() - clock.starts_s,
        "quick": quick,
        "notes": notes,
    }


def _line(row: Mapping[str, Any]) -> str:
    jct, ttft = row["jct_s"], row["ttft_s"]
    wrong = f", {row['errors']} errors" if row["errors"] else ""
    wrong += f", {row['recomputed']} recomputed" if row["recomputed"] else ""
    return (
        f"{row['condition']:>16} {row['policy']:<24} JCT {jct['p50']:6.2f} p95 {jct['p95']:6.2f}"
        f"  TTFT {ttft['p50']:6.2f}  {row['bytes_wire'] / 1e6:7.1f} MB{wrong}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _markdown() -> int:
    """Print the tables of the last run; 1 if there is none."""
    try:
        document = json.loads(DOCUMENT.read_text())
    except OSError as error:
        print(f"pd_bench: nothing was measured yet: {error}", file=sys.stderr)
        return 1
    print(pd_markdown.tables(document))
    return 0


def main() -> int:
    """Measure, print, draw and write; 1 if a claim does not surely hold or nothing could be measured."""
    known = parser(__doc__.partition("\n")[0])
    known.add_argument(
        "--minutes", type=float, help=f"by default {MINUTES:g}, or {QUICK_MINUTES:g} quickly"
    )
    known.add_argument(
        "--markdown", action="store_true", help=f"print the tables of {DOCUMENT.name} for the docs"
    )
    known.add_argument("--only", help="a link alone, as tables name it; no figure is drawn")
    options = known.parse_args()
    if options.markdown:
        return _markdown()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    options.minutes = options.minutes or (QUICK_MINUTES if quick else MINUTES)
    # so that a terminated run takes its engines and namespaces down, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        document = measure(options, quick=quick)
    except (KVServeError, pd_links.LinkError, pd_servers.ServerError, OSError) as error:
        print(f"pd_bench: {error}", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(json.dumps(document, indent=2) + "\n")
    if options.only is None:
        from pd_figure import draw  # matplotlib is slow to import

        draw(document, OUT / "pd-quick.png" if quick else FIGURE)
    if options.json:
        print(json.dumps(document))
    else:
        console = Console(width=170)
        for table in (run_table(document), claim_table(document), model_table(document)):
            console.print(table)
        for note in document["notes"]:
            console.print(f"note: {note}", highlight=False, markup=False)
    return 0 if all(claim["holds"] for claim in document["claims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
