"""The first token of a prompt whose prefix lies in a KV store, against computing it: ``make bench-store``.

Two vLLM servers with SmolLM2-135M-Instruct, a core and a thread each, share a Redis behind links whose rate is set with
htb (`pd_links`, needs root), or with ``--store`` another store. Prompts are real; of each the first 500, 1,000, 2,000
or, over one link, 8,000 tokens are in the store, and a few new ones follow. Modes are

* ``recompute``: nothing is there;
* ``floor``: the few new tokens alone, without a prefix: what the engine takes anyway, so no store can be faster;
* ``raw`` and fixed profiles: the store's values are coded with it, and always fetched;
* ``lmcache``: LMCache in the place of KVServe, with the same Redis (`store_lmcache`); left out with ``--no-lmcache``,
  for another store, and where its packages can't be had;
* ``kvserve``: the controller's table decides how they are coded, and the engine whether to fetch or to compute.

It says how long it will take, prints a table, or JSON with ``--json``, writes ``build/bench/store.json`` and draws
``docs/figures/store.png``. ``QUICK=1`` takes two minutes, besides the engines' start: fewer prefixes, rates and modes;
it leaves the committed figure alone. Prompts and profiles are as in `pd_bench`.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from rich.console import Console

import pd_links
import pd_load
import pd_profiles
import pd_servers
import store_lmcache
import store_redis
from kvserve_api.errors import KVServeError
from kvserve_api.profile_set import NONE, ParetoSet
from pd_options import OUT, ROOT, parser
from pd_plan import START_S
from pd_tables import claim_table, machine
from peers_fetch import FetchError
from store_plan import QUICK, Size
from store_prompts import SUFFIX_TOKENS, Prompts, first_token_s
from store_rows import (
    FLOOR,
    KVSERVE,
    RAW,
    RECOMPUTE,
    Row,
    claims,
    link_name,
    row_of,
    table,
    vs_recompute,
)

FIGURE: Final = ROOT / "docs" / "figures" / "store.png"
QUIET_S: Final = 0.6
"""For so long nothing was stored: then a prefix is there."""
MOST_WAIT_S: Final = 60.0
TELLING: Final = 8
"""Fetches of one prefix over a new link, before anything is stored for it."""
MAX_TOKENS: Final = 8192
"""Of a prompt and its answer: as many as the model takes."""


class Bench:
    """The engines and their store.

    Args:
        pair: One engine always fetches what is there, the other decides.
        pareto: All profiles.
        documents: Tokens of the texts that prompts are made of.
        name: Of the kind of store.
    """

    def __init__(
        self,
        pair: pd_servers.Pair,
        pareto: ParetoSet,
        documents: Sequence[Sequence[int]],
        name: str,
    ) -> None:
        self._pair = pair
        self._pareto = pareto
        self._front = pd_profiles.of_front(pareto, 1000 * pd_profiles.TOKEN_BYTES)
        self._prompts = Prompts(documents)
        self._name = name

    def measure(self, size: Size) -> Iterator[Row]:
        """Measure every mode: first store each prefix, then read it over each link."""
        computed: dict[int, list[float]] = {}
        floor: list[float] = []
        for engine in (self._pair.prefill, self._pair.decode):
            first_token_s(engine, self._prompts.new(500))
        for mode in size.modes:
            self._use(mode)
            engine = self._pair.decode if mode == KVSERVE else self._pair.prefill
            floor += [
                first_token_s(engine, self._prompts.new(SUFFIX_TOKENS)) for _ in range(size.repeats)
            ]
            yield from self._read(size, mode, engine, size.prefixes, size.rates_mbit, computed)
            if mode == KVSERVE and size.long:
                rates = (size.long_mbit,)
                yield from self._read(size, mode, engine, (size.long,), rates, computed)
        for prefix, seconds in computed.items():
            for mbit in (size.long_mbit,) if prefix == size.long else size.rates_mbit:
                yield row_of(self._name, mbit, prefix, RECOMPUTE, seconds)
                yield row_of(self._name, mbit, prefix, FLOOR, floor)

    def _read(
        self,
        size: Size,
        mode: str,
        engine: pd_servers.Engine,
        prefixes: Sequence[int],
        rates_mbit: Sequence[float | None],
        computed: dict[int, list[float]],
    ) -> Iterator[Row]:
        """Measure one mode, and what computing takes meanwhile.

        What chooses how a prefix is coded stores it over the link that it is read over; others store it once.
        """
        stored = [] if mode == KVSERVE else self._stored(engine, prefixes, size.texts, computed)
        for mbit in rates_mbit:
            self._pair.link.shape_wires(mbit)
            if mode == KVSERVE:
                # a link that stays as it is: some fetches tell how fast that is
                for _, prompt in self._stored(engine, size.prefixes[:1], 1, computed) * TELLING:
                    first_token_s(engine, self._prompts.longer(prompt))
                stored = self._stored(engine, prefixes, size.texts, computed)
            for _, prompt in stored[: size.texts]:
                first_token_s(engine, self._prompts.longer(prompt))
            found: dict[int, list[float]] = {prefix: [] for prefix in prefixes}
            for _ in range(size.repeats):
                for prefix, prompt in stored:
                    found[prefix].append(first_token_s(engine, self._prompts.longer(prompt)))
            for prefix, seconds in found.items():
                yield row_of(self._name, mbit, prefix, mode, seconds)
        self._pair.link.shape_wires(None)

    def _stored(
        self,
        engine: pd_servers.Engine,
        prefixes: Sequence[int],
        texts: int,
        computed: dict[int, list[float]],
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Have prefixes computed, which takes note of the times, and wait until each is in the store."""
        stored: list[tuple[int, tuple[int, ...]]] = []
        for prefix in prefixes:
            for _ in range(texts):
                prompt = self._prompts.new(prefix)
                before = _saved(engine)
                computed.setdefault(prefix, []).append(first_token_s(engine, prompt))
                self._settle(engine, before)
                stored.append((prefix, prompt))
        return stored

    def _use(self, mode: str) -> None:
        use = self._pair.controller.use
        if mode == KVSERVE:
            use(self._front)
        else:
            pinned = NONE if mode == RAW else mode
            use(self._pareto, control={"mode": "Pinned", "pinnedProfile": pinned})

    def _settle(self, engine: pd_servers.Engine, before: float) -> None:
        """Wait until more is stored than before, and then nothing more is being stored."""
        last, changed_s = before, time.monotonic()
        deadline_s = changed_s + MOST_WAIT_S
        while last == before or time.monotonic() - changed_s < QUIET_S:
            time.sleep(0.1)
            now = _saved(engine)
            if now != last:
                last, changed_s = now, time.monotonic()
            if time.monotonic() > deadline_s:
                raise pd_servers.ServerError(
                    "the store does not come to rest, or nothing is stored"
                )


def _saved(engine: pd_servers.Engine) -> float:
    """Return how many tokens an engine has stored."""
    return engine.totals().get("store_tokens{saved}", 0.0)


def measure(options: argparse.Namespace, *, quick: bool) -> dict[str, Any]:
    """Do all that ``make bench-store`` does, and return the document."""
    start_s = time.perf_counter()
    size = QUICK if quick else Size()
    model = (options.model or pd_profiles.model_folder()).resolve()
    pareto = pd_profiles.measured(model, options.bundle, options.cache)
    documents = pd_load.tokens(pd_load.texts(options.texts), model)
    peer = size.lmcache_seconds > 0 and options.lmcache and options.store is None
    seconds, starts = size.seconds, 1
    if peer:
        seconds, starts = seconds + size.lmcache_seconds, 2
    _say(f"about {seconds / 60:.0f} min, and {starts * START_S:.0f} s for the engines' start")
    rows: list[Row] = []
    told = partial(_say_row, start_s=start_s)
    name = "redis" if options.store is None else urlsplit(options.store).scheme
    with (
        pd_links.laid() as link,
        store_redis.served(options.store) as url_at,
    ):
        roles = [
            ("kv_both", {"store": {"url": url_at(end), "recompute": decides}})
            for end, decides in zip(link.ends, (False, True), strict=True)
        ]
        artifacts = pd_profiles.artifacts(options.cache)
        with pd_servers.running(
            link, model, artifacts, OUT / "store-logs", roles, max_tokens=MAX_TOKENS
        ) as pair:
            _say(f"the engines run; their logs: {OUT / 'store-logs'}")
            for row in Bench(pair, pareto, documents, name).measure(size):
                rows.append(told(row))
        if peer:
            try:
                for row in store_lmcache.measure(
                    link,
                    store_redis.PORT,
                    model,
                    documents,
                    OUT / "lmcache-logs",
                    prefixes=size.prefixes,
                    rates_mbit=size.rates_mbit,
                    repeats=size.repeats,
                    max_tokens=MAX_TOKENS,
                ):
                    rows.append(told(row))
            except FetchError as error:
                _say(f"without LMCache: {error}")
    return {
        "runs": rows,
        "vs_recompute": vs_recompute(rows),
        "claims": claims(rows),
        "machine": machine(),
        "quick": quick,
    }


def _say_row(row: Row, *, start_s: float) -> Row:
    _say(
        f"{link_name(row['bandwidth_mbit']):>12} {row['prefix_tokens']:5} {row['mode']:<12}"
        f" TTFT {row['ttft_s']['p50']:.3f}  [{time.perf_counter() - start_s:.0f} s]"
    )
    return row


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument(
        "--store",
        help="URL of a store, as engines in network namespaces of their own reach it; by default a Redis here",
    )
    made.add_argument(
        "--no-lmcache", dest="lmcache", action="store_false", help="leave LMCache out"
    )
    return made


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, draw and write; 1 if a claim does not hold or nothing could be measured."""
    options = _parser().parse_args()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    # so that a terminated run takes its engines and namespaces down, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        document = measure(options, quick=quick)
    except (KVServeError, pd_links.LinkError, pd_servers.ServerError, OSError) as error:
        print(f"store_bench: {error}", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "store.json").write_text(json.dumps(document, indent=2) + "\n")
    from pd_figure import draw_store  # matplotlib is slow to import

    draw_store(document, OUT / "store-quick.png" if quick else FIGURE)
    if options.json:
        print(json.dumps(document))
    else:
        console = Console(width=150)
        for drawn in (table(document), claim_table(document)):
            console.print(drawn)
    return 0 if all(claim["holds"] for claim in document["claims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
