"""The first token of a prompt whose prefix lies in a KV store, against computing it: ``make bench-store``.

Two vLLM servers with SmolLM2-135M-Instruct, a core and a thread each, share a Redis behind links whose rate is set with
htb (`pd_links`, needs root), or with ``--store`` another store. Prompts are real; of each the first 500, 1,000, 2,000
or, over one link, 8,000 tokens are in the store, and a few new ones follow. Modes are

* ``recompute``: nothing is there;
* ``floor``: the few new tokens alone, without a prefix: what the engine takes anyway, so no store can be faster;
* ``raw`` and fixed profiles: the store's values are coded with it, and always fetched;
* ``kvserve``: the controller's table decides how they are coded, and the engine whether to fetch or to compute.

It says how long it will take, prints a table, or JSON with ``--json``, writes ``build/bench/store.json`` and draws
``docs/figures/store.png``. ``QUICK=1`` takes two minutes, besides the engines' start: fewer prefixes, rates and modes;
it leaves the committed figure alone. Prompts and profiles are as in `pd_bench`.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from rich.console import Console

import pd_links
import pd_load
import pd_profiles
import pd_servers
from kvserve_api.errors import KVServeError
from kvserve_api.profile_set import NONE, ParetoSet
from pd_links import End
from pd_options import OUT, ROOT, parser
from pd_plan import START_S
from pd_rows import percentiles
from pd_tables import claim_table, machine
from store_rows import FLOOR, KVSERVE, RAW, RECOMPUTE, Row, claims, link_name, table, vs_recompute
from testcluster.process import die_with_parent

FIGURE: Final = ROOT / "docs" / "figures" / "store.png"
SUFFIX_TOKENS: Final = 16
"""New ones behind the prefix."""
QUIET_S: Final = 0.6
"""For so long nothing was stored: then a prefix is there."""
MOST_WAIT_S: Final = 60.0
PORT: Final = 6399
MAX_TOKENS: Final = 8192
"""Of a prompt and its answer: as many as the model takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        prefixes: In tokens.
        rates_mbit: Of the link to the store; None unshaped.
        modes: Besides `RECOMPUTE`.
        long: Another prefix, in tokens, over one link and for ``kvserve`` only; 0 for none.
        long_mbit: The rate of that link.
        repeats: How often each prefix is read.
        texts: Different prefixes of a length.
        seconds: About how long it takes.
    """

    prefixes: tuple[int, ...] = (500, 1000, 2000)
    rates_mbit: tuple[float | None, ...] = (100.0, 1000.0, None)
    modes: tuple[str, ...] = (RAW, "joint-layer", "focus-3", KVSERVE)
    long: int = 8000
    long_mbit: float = 1000.0
    repeats: int = 3
    texts: int = 1
    seconds: float = 150.0


QUICK: Final = Size(
    prefixes=(1000, 2000),
    rates_mbit=(100.0, 1000.0),
    modes=(RAW, "joint-layer", KVSERVE),
    long=0,
    repeats=2,
    texts=1,
    seconds=75.0,
)


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
        self._documents = documents
        self._name = name
        self._dice = random.Random(11)

    def measure(self, size: Size) -> Iterator[Row]:
        """Measure every mode: first store each prefix, then read it over each link."""
        computed: dict[int, list[float]] = {}
        floor: list[float] = []
        for engine in (self._pair.prefill, self._pair.decode):
            self._ask(engine, self._prompt(500))
        for mode in size.modes:
            self._use(mode)
            engine = self._pair.decode if mode == KVSERVE else self._pair.prefill
            floor += [self._ask(engine, self._prompt(SUFFIX_TOKENS)) for _ in range(size.repeats)]
            yield from self._read(size, mode, engine, size.prefixes, size.rates_mbit, computed)
            if mode == KVSERVE and size.long:
                rates = (size.long_mbit,)
                yield from self._read(size, mode, engine, (size.long,), rates, computed)
        for prefix, seconds in computed.items():
            for mbit in (size.long_mbit,) if prefix == size.long else size.rates_mbit:
                yield self._row(mbit, prefix, RECOMPUTE, seconds)
                yield self._row(mbit, prefix, FLOOR, floor)

    def _read(
        self,
        size: Size,
        mode: str,
        engine: pd_servers.Engine,
        prefixes: Sequence[int],
        rates_mbit: Sequence[float | None],
        computed: dict[int, list[float]],
    ) -> Iterator[Row]:
        """Measure one mode, and what computing takes meanwhile."""
        stored: list[tuple[int, tuple[int, ...]]] = []
        for prefix in prefixes:
            for _ in range(size.texts):
                prompt = self._prompt(prefix)
                before = _saved(engine)
                computed.setdefault(prefix, []).append(self._ask(engine, prompt))
                self._settle(engine, before)
                stored.append((prefix, prompt))
        for mbit in rates_mbit:
            self._pair.link.shape_wires(mbit)
            # the first fetch over a new link tells how fast it is
            for _, prompt in stored[: size.texts]:
                self._ask(engine, self._longer(prompt))
            found: dict[int, list[float]] = {prefix: [] for prefix in prefixes}
            for _ in range(size.repeats):
                for prefix, prompt in stored:
                    found[prefix].append(self._ask(engine, self._longer(prompt)))
            for prefix, seconds in found.items():
                yield self._row(mbit, prefix, mode, seconds)
        self._pair.link.shape_wires(None)

    def _row(self, mbit: float | None, prefix: int, mode: str, seconds: Sequence[float]) -> Row:
        return {
            "store": self._name,
            "bandwidth_mbit": mbit,
            "prefix_tokens": prefix,
            "mode": mode,
            "requests": len(seconds),
            "ttft_s": percentiles(seconds),
        }

    def _use(self, mode: str) -> None:
        use = self._pair.controller.use
        if mode == KVSERVE:
            use(self._front)
        else:
            pinned = NONE if mode == RAW else mode
            use(self._pareto, control={"mode": "Pinned", "pinnedProfile": pinned})

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        """Return tokens of a text, from a place that no other prompt begins at."""
        able = [document for document in self._documents if len(document) > tokens]
        document = self._dice.choice(able)
        start = self._dice.randrange(len(document) - tokens)
        return tuple(document[start : start + tokens])

    def _longer(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """Return a prompt with new tokens behind it."""
        return prompt + self._prompt(SUFFIX_TOKENS)

    def _ask(self, engine: pd_servers.Engine, prompt: tuple[int, ...]) -> float:
        """Return the seconds to the first token."""

        async def one() -> pd_load.Timing:
            async with httpx.AsyncClient(timeout=pd_load.TIMEOUT_S) as client:
                request = pd_load.Request(at_s=0.0, prompt=prompt)
                route = pd_load.Route(prefill=engine.url)
                return await pd_load.send(client, request, route, max_tokens=1)

        timing = asyncio.run(one())
        if timing.error:
            raise pd_servers.ServerError(f"a request failed: {timing.error}")
        return timing.ttft_s

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


class RedisServer:
    """A Redis that keeps nothing on disk, on every address of this side."""

    def __init__(self) -> None:
        # Debian's redis-tools holds the server under another name: it looks at the name it is called by
        program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        if program is None:
            raise pd_servers.ServerError("no Redis here: install redis-tools or redis-server")
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(PORT), "--save", "", "--protected-mode", "no"],
            executable=program,
            stdout=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def _store(url: str | None) -> Iterator[Callable[[End], str]]:
    """Yield what tells each end the store's URL: of a Redis of our own, unless there is another."""
    if url is not None:
        yield lambda _: url
        return
    server = RedisServer()
    try:
        yield lambda end: f"redis://{end.here}:{PORT}/0"
    finally:
        server.stop()


def measure(options: argparse.Namespace, *, quick: bool) -> dict[str, Any]:
    """Do all that ``make bench-store`` does, and return the document."""
    start_s = time.perf_counter()
    size = QUICK if quick else Size()
    model = (options.model or pd_profiles.model_folder()).resolve()
    pareto = pd_profiles.measured(model, options.bundle, options.cache)
    documents = pd_load.tokens(pd_load.texts(options.texts), model)
    _say(f"about {size.seconds / 60:.0f} min, and {START_S:.0f} s for the engines' start")
    rows: list[Row] = []
    name = "redis" if options.store is None else urlsplit(options.store).scheme
    with (
        pd_links.laid() as link,
        _store(options.store) as url_at,
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
                rows.append(row)
                _say(
                    f"{link_name(row['bandwidth_mbit']):>12} {row['prefix_tokens']:5} {row['mode']:<12}"
                    f" TTFT {row['ttft_s']['p50']:.3f}  [{time.perf_counter() - start_s:.0f} s]"
                )
    return {
        "runs": rows,
        "vs_recompute": vs_recompute(rows),
        "claims": claims(rows),
        "machine": machine(),
        "quick": quick,
    }


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument(
        "--store",
        help="URL of a store, as engines in network namespaces of their own reach it; by default a Redis here",
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
