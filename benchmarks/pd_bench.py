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

It says how long it will take; ``--minutes N`` makes the number of requests fit. It prints tables, or JSON with
``--json``, writes ``build/bench/pd.json`` and draws ``docs/figures/pd.png``. ``QUICK=1`` takes two minutes, besides the
engines' start: fewer links, policies and requests; it leaves the committed figure alone. The first run calibrates the
model and measures the profiles, which takes six minutes more, once.

Prompts are made of the project's data folder (WikiText-2 test, HumanEval, GSM8K test; ``--texts``); where it is not, of
the profiler's built-in corpus.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any, Final

from rich.console import Console

import pd_claims
import pd_links
import pd_load
import pd_model
import pd_profiles
import pd_servers
from kvserve_api.errors import KVServeError
from kvserve_api.profile_set import DEFAULT_CLASS, NONE, ParetoSet
from kvserve_connector.config import DEFAULT_PORT as TRANSFER_PORT
from pd_load import Request, Route, Timing
from pd_options import OUT, ROOT, parser
from pd_plan import (
    ALONE,
    GENERATED,
    KVSERVE,
    KVSERVE_QUALITY,
    LATE,
    RAW,
    START_S,
    Condition,
    Moves,
    Speeds,
    plan,
)
from pd_tables import claim_table, machine, model_table, run_table

FIGURE: Final = ROOT / "docs" / "figures" / "pd.png"
MINUTES: Final = 25.0
QUICK_MINUTES: Final = 2.0
BUDGET_BP: Final = 100
"""The quality budget of the policy, and so of what counts as the best fixed profile."""
OBJECTIVE_S: Final = 2.0
"""What most transfers of a MaximizeQuality policy shall take at most."""
PROBE_TOKENS: Final = 1000
PROBES: Final = 5
OVERTIME: Final = 1.05
"""Beyond so many times the time that was given nothing more is begun."""
SETTLE_S: Final = 1.2
"""vLLM's metrics page is that much behind."""


class Run:
    """The engines, and what is compared on them.

    Args:
        pair: The engines.
        pareto: All profiles.
        documents: Tokens of the texts that prompts are made of.
    """

    def __init__(
        self, pair: pd_servers.Pair, pareto: ParetoSet, documents: Sequence[Sequence[int]]
    ) -> None:
        self.pair = pair
        self.documents = documents
        self._pareto = pareto
        self._front = pd_profiles.of_front(pareto, PROBE_TOKENS * pd_profiles.TOKEN_BYTES)
        self._losses = {p.name: p.loss_bp for p in pareto.classes[DEFAULT_CLASS]}

    def warm_up(self) -> Speeds:
        """Send the first requests, and return what the machine does."""
        requests = pd_load.schedule(self.documents, 6, 1.0, seed=99)
        self.use(RAW)
        calm = Condition(name="", mbit=None, requests=3, per_s=0, policies=())
        for policy in (ALONE, RAW, LATE):
            self._drive(requests[:3], self._route(policy), calm)
        probes = [replace(r, prompt=(r.prompt * 2)[:PROBE_TOKENS]) for r in requests[3:]]
        found = self._drive(probes, self._route(ALONE), calm)
        # not the fastest: what this machine does only at its best would overload it
        usual = sorted(found, key=lambda t: t.ttft_s)[len(found) // 2]
        if error := next((t.error for t in found if t.error), ""):
            raise pd_servers.ServerError(f"the prefill engine does not answer: {error}")
        mean_tokens = pd_load.mean_tokens()
        return Speeds(
            prefill_s_per_token=usual.ttft_s / PROBE_TOKENS,
            job_s=usual.ttft_s * mean_tokens / PROBE_TOKENS + usual.jct_s - usual.ttft_s,
            request_s=self._request_s(),
            mean_tokens=mean_tokens,
        )

    def use(self, policy: str) -> None:
        """Put a policy in force."""
        use = self.pair.controller.use
        if policy == KVSERVE:
            use(self._front, quality={"maxLossBasisPoints": BUDGET_BP})
        elif policy == KVSERVE_QUALITY:
            objective = {
                "name": "transfer",
                "metric": "KVTransferTime",
                "percentile": 95,
                "thresholdMilliseconds": round(OBJECTIVE_S * 1000),
            }
            use(
                self._front,
                quality={"maxLossBasisPoints": BUDGET_BP},
                slo={"goal": "MaximizeQuality", "objectives": [objective]},
            )
        elif policy != ALONE:
            name = NONE if policy == RAW else policy.removesuffix(LATE)
            use(self._pareto, control={"mode": "Pinned", "pinnedProfile": name})

    def measure(self, condition: Condition, policy: str, turn: slice) -> pd_claims.Cell:
        """Run one policy under one condition, with those of its requests that are this turn's."""
        whole = pd_load.schedule(
            self.documents, condition.requests, condition.per_s or 1.0, condition.seed
        )
        requests = [replace(r, at_s=r.at_s - whole[turn][0].at_s) for r in whole[turn]]
        self.use(policy)
        link = self.pair.link
        link.shape(Moves().mbit(0.0) if condition.moving else condition.mbit)
        before, sent = self.pair.totals(), link.sent_bytes()
        timings = self._drive(requests, self._route(policy), condition)
        bytes_wire = link.sent_bytes() - sent
        link.shape(None)
        time.sleep(SETTLE_S)
        return pd_claims.Cell(
            timings=tuple(timings),
            bytes_wire=bytes_wire,
            grown=pd_claims.counted(before, self.pair.totals()),
        )

    def row(self, condition: Condition, policy: str, cell: pd_claims.Cell) -> pd_claims.Row:
        """Return what a policy got, in figures."""
        return pd_claims.row(
            condition, policy, cell, losses_bp=self._losses, objective_s=OBJECTIVE_S
        )

    def lossy(self) -> list[str]:
        """Return the profiles beyond the budget."""
        profiles = self._pareto.classes[DEFAULT_CLASS]
        return [p.name for p in profiles if p.loss_upper_bp > BUDGET_BP]

    def _request_s(self) -> float:
        """Return what the decode engine takes for a token, if there is nothing to transfer."""
        one = Request(at_s=0.0, prompt=tuple(self.documents[0][:1]))
        route = Route(prefill=self.pair.decode.url)
        found = asyncio.run(pd_load.run([one] * PROBES, route, max_tokens=1, one_by_one=True))
        if error := next((t.error for t in found if t.error), ""):
            raise pd_servers.ServerError(f"the decode engine does not answer: {error}")
        return median(t.ttft_s for t in found)

    def _route(self, policy: str) -> Route:
        prefill, decode = self.pair.prefill, self.pair.decode
        if policy == ALONE:
            return Route(prefill=prefill.url)
        early = None if policy.endswith(LATE) else (prefill.end.address, TRANSFER_PORT)
        return Route(prefill=prefill.url, decode=decode.url, early=early)

    def _drive(
        self, requests: Sequence[Request], route: Route, condition: Condition
    ) -> list[Timing]:
        async def both() -> list[Timing]:
            mover = asyncio.create_task(self._move()) if condition.moving else None
            try:
                return await pd_load.run(
                    requests,
                    route,
                    max_tokens=GENERATED,
                    one_by_one=not condition.per_s,
                )
            finally:
                if mover is not None:
                    mover.cancel()
                    with suppress(asyncio.CancelledError):
                        await mover

        return asyncio.run(both())

    async def _move(self) -> None:
        """Change the link's rate at the times of `Moves`."""
        moves, start_s, number = Moves(), time.monotonic(), 0
        while True:
            number += 1
            await asyncio.sleep(start_s + number * moves.phase_s - time.monotonic())
            await asyncio.to_thread(
                self.pair.link.shape, moves.mbit((number + 0.5) * moves.phase_s)
            )


def measure(options: argparse.Namespace, *, quick: bool) -> dict[str, Any]:
    """Do all that ``make bench-pd`` does, and return the document."""
    start_s = time.perf_counter()
    model = (options.model or pd_profiles.model_folder()).resolve()
    pareto = pd_profiles.measured(model, options.bundle, options.cache)
    documents = pd_load.tokens(pd_load.texts(options.texts), model)
    if not options.texts.is_dir():
        _say(f"no {options.texts}: prompts are made of the built-in corpus")
    budget_s = options.minutes * 60
    _say(f"about {options.minutes:.0f} min, and {START_S:.0f} s for the engines' start")
    rows: list[dict[str, Any]] = []
    with (
        pd_links.laid() as link,
        pd_servers.running(
            link, model, pd_profiles.artifacts(options.cache), OUT / "pd-logs"
        ) as pair,
    ):
        run = Run(pair, pareto, documents)
        started_s = time.perf_counter()
        _say(f"the engines run after {started_s - start_s:.0f} s; their logs: {OUT / 'pd-logs'}")
        speeds = run.warm_up()
        left_s = budget_s - (time.perf_counter() - started_s)
        conditions = plan(speeds, budget_s=left_s, quick=quick)
        _say(
            f"prefill {1e3 * speeds.prefill_s_per_token:.2f} ms a token, {speeds.per_s:.2f} requests/s;"
            f" {conditions[-1].requests} requests on the moving link"
        )
        notes = list(NOTES)
        ends_s = started_s + budget_s * OVERTIME
        for row in compare(run, conditions, notes, ends_s=ends_s):
            rows.append(row)
            _say(_line(row) + f"  [{time.perf_counter() - start_s:.0f} s]")
        lossy = run.lossy()
    behind = pd_claims.overlap(rows, request_s=speeds.request_s)
    if behind is not None:
        notes.append(
            f"pulled while it goes on, a prefill takes {behind['prefill_times']:.2f} times as long, and the first token"
            f" {behind['ttft_times']:.2f} times as long as if pulled afterwards, over 100 Mbit/s."
        )
    return {
        "runs": rows,
        "vs_raw": pd_claims.vs_raw(rows),
        "vs_best_static": pd_claims.vs_best_static(rows, lossy),
        "claims": pd_claims.claims(rows, lossy, request_s=speeds.request_s),
        "overlap": behind,
        "modelled": pd_model.modelled(
            rows,
            pareto,
            prefill_s_per_token=speeds.prefill_s_per_token,
            job_s=speeds.job_s,
        ),
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
        "prefill_s_per_token": speeds.prefill_s_per_token,
        "request_s": speeds.request_s,
        "requests_per_s": speeds.per_s,
        "quick": quick,
        "notes": notes,
    }


def compare(
    run: Run, conditions: Sequence[Condition], notes: list[str], *, ends_s: float
) -> Iterator[pd_claims.Row]:
    """Yield what each policy got under each condition.

    Args:
        run: The engines.
        conditions: What to compare under.
        notes: Takes what was not measured, and why.
        ends_s: When nothing more is begun, on `time.perf_counter`.
    """
    for condition in conditions:
        cells: dict[str, pd_claims.Cell] = {}
        failed: set[str] = set()
        for turn, policy in product(condition.turns(), condition.policies):
            if policy in failed:
                continue
            cell = _tried(run, condition, policy, turn, ends_s)
            if isinstance(cell, str):
                failed.add(policy)
                notes.append(f"{condition.name}, {policy}: not measured, {cell}")
                _say(notes[-1])
                continue
            cells[policy] = cells[policy] + cell if policy in cells else cell
            if turn.stop == condition.requests:
                yield run.row(condition, policy, cells[policy])


def _tried(
    run: Run, condition: Condition, policy: str, turn: slice, ends_s: float
) -> pd_claims.Cell | str:
    """Return what was measured, or why nothing was."""
    if time.perf_counter() > ends_s:
        return "the time was up"
    try:
        return run.measure(condition, policy, turn)
    except (pd_servers.ServerError, OSError) as error:
        return str(error)


NOTES: Final = (
    "LMCache's multi-process connector is not among the policies: it needs an environment of its own (its wheel wants"
    " CUDA, its pins exclude vLLM's), which this benchmark does not make.",
    "One core an engine: encoding competes with prefill, decoding with generation.",
)


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


def main() -> int:
    """Measure, print, draw and write; 1 if a claim does not hold or nothing could be measured."""
    known = parser(__doc__.partition("\n")[0])
    known.add_argument(
        "--minutes", type=float, help=f"by default {MINUTES:g}, or {QUICK_MINUTES:g} quickly"
    )
    options = known.parse_args()
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
    (OUT / "pd.json").write_text(json.dumps(document, indent=2) + "\n")
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
