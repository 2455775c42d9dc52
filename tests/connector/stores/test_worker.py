"""The worker's side of a KV store: what one saves another loads, and what goes wrong is counted and told."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kv_loopback import BLOCK, ENGINE, FORM, LAYOUT, LoopbackCache, make_cache
from kvserve_api.errors import UnavailableError
from kvserve_api.latency import Link, StageCost
from kvserve_api.selection import select
from kvserve_api.table import DecisionTable
from kvserve_connector.bundles import BundleBook
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.metrics import Metrics
from kvserve_connector.ready import ReadyTable
from kvserve_connector.recompute import Speed
from kvserve_connector.selector import DEFAULT_BYTES_PER_S, Selector
from kvserve_connector.stores import worker as worker_module
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.messages import (
    Lookup,
    Prompt,
    StoreLoad,
    StoreNews,
    StoreSave,
    StoreStep,
)
from kvserve_connector.stores.prefixes import PrefixStore
from kvserve_connector.stores.reader import EARLY, MAX_LOADS
from kvserve_connector.stores.url import open_kv_store
from kvserve_connector.stores.worker import SAVING_IDLE_S, SHARED_IDLE_S, ClosedStore, StoreWorker
from kvserve_connector.stores.writer import MAX_WAITING
from tables import table

CHUNK = 32
TOKENS = list(range(500, 600))
STOP = 96
HERE, THERE = tuple(range(1, 8)), tuple(range(20, 27))
SLOW = Speed(step_s=0.0, token_s=1.0, attention_s=0.0)
FAST = Speed(step_s=0.0, token_s=1e-9, attention_s=0.0)


class Engine:
    """A cache with the worker's side of a store, and what it has told so far."""

    def __init__(self, url: str, cache: LoopbackCache, threads: int = 1, **settings: Any) -> None:
        self.cache = cache
        self.selector = Selector()
        self.metrics = Metrics(self.selector)
        self.coders = ThreadPoolExecutor(threads)
        self.store = StoreWorker(
            replace(StoreConfig(url=url, chunk_tokens=CHUNK, timeout_s=2.0), **settings),
            "model@1",
            cache,
            ChunkCoder(FORM, lambda _: None),
            self.coders,
            self.selector,
            BundleBook(None, ENGINE.fingerprint, ENGINE.layout),
            self.metrics,
            threads=threads,
        )
        self.news = StoreNews()
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.invalid: set[int] = set()
        self.totals: dict[str, dict[str, Any]] = {}

    def soon(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Take what the worker tells until something holds."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            sent, received, invalid = self.store.take_results()
            self.sent |= sent
            self.received |= received
            self.invalid |= invalid
            if (news := self.store.take_news()) is not None:
                self.news.found.update(news.found)
                self.news.failed |= news.failed
                self.news.saved |= news.saved
                self.news.steps += news.steps
            for kind, counts in self.metrics.take_totals().items():
                known = self.totals.setdefault(kind, {})
                for key, count in counts.items():
                    if kind != "rows":
                        known[key] = known.get(key, 0) + count
            if holds():
                return True
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.005)

    def save(self, request_id: str, tokens: list[int] = TOKENS) -> bool:
        """Save a prompt, and wait for its end."""
        save = StoreSave(prompt=prompt(request_id, tokens), start=0, block_ids=HERE)
        self.store.take(StoreStep(saves=[save]))
        return self.soon(lambda: request_id in self.news.saved)

    def look(
        self,
        request_id: str,
        tokens: list[int] = TOKENS,
        computed: int = 0,
        speed: Speed | None = None,
    ) -> int:
        """Look for a prompt, and return up to where it is worth fetching."""
        lookup = Lookup(prompt=prompt(request_id, tokens), computed=computed, speed=speed)
        self.store.take(StoreStep(lookups=[lookup]))
        assert self.soon(lambda: request_id in self.news.found)
        return self.news.found[request_id]

    def load(self, request_id: str, tokens: range) -> bool:
        """Load what was found, and wait for its end."""
        load = StoreLoad(request_id=request_id, tokens=tokens, block_ids=THERE)
        self.store.take(StoreStep(loads=[load]))
        return self.soon(lambda: request_id in self.received)


def prompt(request_id: str, tokens: list[int], *extras: str) -> Prompt:
    """Return a prompt."""
    packed = np.asarray(tokens, dtype=np.int32).tobytes()
    return Prompt(request_id=request_id, tokens=packed, extras=extras, workload="default")


@contextmanager
def engine(folder: Path, seed: int | None = None, **settings: Any) -> Iterator[Engine]:
    """Run an engine with a store in a folder."""
    made = Engine((folder / "kv").as_uri(), make_cache(seed=seed), **settings)
    try:
        yield made
    finally:
        made.store.close()
        made.coders.shutdown()


def same(ours: LoopbackCache, theirs: LoopbackCache, tokens: range) -> bool:
    """Tell whether a prompt's KV here is that of the other engine."""
    layers = range(LAYOUT.layers)
    a, b = ours.read_tokens(layers, tokens, THERE), theirs.read_tokens(layers, tokens, HERE)
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_one_saves_another_loads(tmp_path: Path) -> None:
    """A saved prompt is found by another engine, to a step, and arrives in the blocks that it names; all is counted."""
    with engine(tmp_path, seed=3, profile="lossless") as writer, engine(tmp_path) as reader:
        assert reader.look("early") == 0
        assert writer.save("a")
        assert reader.look("b") == STOP
        assert reader.load("b", range(STOP))
        assert same(reader.cache, writer.cache, range(STOP))
        assert reader.invalid == set()
        assert writer.totals["tokens"] == {"saved": STOP}
        assert reader.totals["tokens"] == {"asked": 200, "found": STOP, "loaded": STOP}
        assert reader.totals["decisions"] == {"fetch Unmeasured": 1}
        assert reader.totals["operations"]["get Hit"] == 3
        # for each chunk a value, and its place in the list of what lies behind the one before
        assert writer.totals["operations"]["put Done"] == 6


def test_every_thread_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many values of one load are decoded side by side as there are threads for it."""
    together = threading.Barrier(3, timeout=10)
    with (
        engine(tmp_path, seed=3) as writer,
        engine(tmp_path, threads=together.parties) as reader,
    ):
        writer.save("a")
        assert reader.look("b") == STOP
        decode = PrefixStore.decode

        def meet(*given: Any, **options: Any) -> Any:
            together.wait()
            return decode(*given, **options)

        monkeypatch.setattr(PrefixStore, "decode", meet)
        assert reader.load("b", range(STOP))
        assert reader.invalid == set()
        assert same(reader.cache, writer.cache, range(STOP))


def test_what_is_stored_may_be_slow_to_code(tmp_path: Path) -> None:
    """A prompt is stored in what is read soonest, however long coding it takes, which no reader waits for."""
    coded = table("none", "int4-token")
    slow = replace(coded.candidates["int4-token"], encode=StageCost(bytes_per_s=2e7))
    coded = replace(coded, candidates=coded.candidates | {"int4-token": slow})
    with engine(tmp_path, seed=3) as writer, engine(tmp_path, profile="int4-token") as reader:
        assert choose_for_peers(coded) == "none"
        writer.selector.install(ReadyTable.of(coded))
        assert writer.save("a")
        # without a table nothing lossy is read but what is stored here, too
        assert writer.look("b") == reader.look("b") == STOP
        writer.selector.drop()
        assert writer.look("c") == 0


def choose_for_peers(coded: DecisionTable) -> str:
    """Return what a transfer to another engine over 1 Gbit/s would be coded with."""
    selection = select(
        coded,
        "default",
        native_bytes=LAYOUT.native_bytes(STOP),
        link=Link(bytes_per_s=DEFAULT_BYTES_PER_S),
        chunks=3,
    )
    return selection.profile


def test_only_what_is_not_here_is_loaded(tmp_path: Path) -> None:
    """Tokens that the prefix cache has are neither fetched nor overwritten, also inside a chunk."""
    with engine(tmp_path, seed=3) as writer, engine(tmp_path) as reader:
        writer.save("a")
        assert reader.look("b", computed=48) == STOP
        assert reader.load("b", range(48, STOP))
        assert same(reader.cache, writer.cache, range(48, STOP))
        before, _ = reader.cache.read_tokens(range(LAYOUT.layers), range(48), THERE)
        assert not before.any()
        assert reader.totals["operations"]["get Hit"] == 2
        assert reader.look("c", computed=STOP) == 0


def test_what_is_faster_computed_is_not_fetched(tmp_path: Path) -> None:
    """A fast engine computes what a slow one fetches, unless it is told to fetch always; each says why."""
    with engine(tmp_path, seed=3) as writer, engine(tmp_path) as reader:
        writer.save("a")
        assert reader.look("b", speed=SLOW) == STOP
        assert reader.load("b", range(STOP))
        assert reader.look("c", speed=SLOW) == STOP
        assert reader.look("d", speed=FAST) == 0
        assert reader.totals["decisions"] == {
            "fetch Unmeasured": 1,
            "fetch FetchFaster": 1,
            "recompute RecomputeFaster": 1,
        }
    with engine(tmp_path, recompute=False) as reader:
        assert reader.look("e", speed=FAST) == STOP


def early_of(reader: Engine, request_id: str) -> int:
    """Return how many values of a prompt have arrived before its load began."""
    plan = reader.store._reader._plans.get(request_id)
    return 0 if plan is None else sum(arriving.done() for arriving in plan.early.values())


def test_first_values_are_fetched_while_the_engine_finds_room(tmp_path: Path) -> None:
    """What is worth fetching is asked for at once, for so many prompts; a load takes it, and an end gives it up."""
    with engine(tmp_path, seed=3) as writer, engine(tmp_path) as reader:
        writer.save("a")
        names = [f"b{number}" for number in range(MAX_LOADS + 1)]
        for name in names:
            assert reader.look(name) == STOP
        assert reader.soon(
            lambda: [early_of(reader, n) for n in names] == [EARLY] * MAX_LOADS + [0]
        )
        assert reader.load(names[0], range(STOP))
        assert same(reader.cache, writer.cache, range(STOP))
        hits = EARLY * MAX_LOADS + STOP // CHUNK - EARLY
        assert reader.soon(lambda: reader.totals["operations"]["get Hit"] == hits)
        reader.store.take(StoreStep(finished=names[1:]))
        assert not reader.store._reader._plans
        assert reader.look("c") == STOP
        assert reader.soon(lambda: early_of(reader, "c") == EARLY)


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_what_is_whole_is_kept(harm: str, tmp_path: Path) -> None:
    """Where a value is damaged or gone the blocks behind the last whole chunk are told, and the value is replaced."""
    with engine(tmp_path, seed=3) as writer, engine(tmp_path) as reader:
        writer.save("a")
        *_, last = sorted((tmp_path / "kv").rglob("0-7"), key=lambda p: p.stat().st_mtime_ns)
        assert reader.look("b") == STOP
        if harm == "gone":
            last.unlink()
        else:
            content = bytearray(last.read_bytes())
            content[-100] ^= 1
            last.write_bytes(content)
        assert reader.load("b", range(STOP))
        # those that were asked for early
        assert reader.invalid == set(THERE[EARLY * CHUNK // BLOCK : STOP // BLOCK])
        assert same(reader.cache, writer.cache, range(EARLY * CHUNK))
        assert reader.news.failed == {"b"}
        reason = {"gone": "Expired", "damaged": "ChecksumMismatch"}[harm]
        assert reader.totals["failures"] == {f"load {reason}": 1}
        assert not last.exists()
        writer.save("c")
        assert last.exists()


def test_idle_steps_wait_for_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a step that computes nothing waits, and for what is only being saved no longer than a request may wait."""
    with engine(tmp_path, seed=3) as each:
        waited_s: list[float] = []
        monkeypatch.setattr(each.store._changed, "wait", waited_s.append)
        for step in (StoreStep(idle=True), StoreStep(kept=["a"])):
            each.store.take(step)
            each.store.take_results()
        assert waited_s == []
        each.store.take(StoreStep(idle=True))
        each.store.take_results()
        assert waited_s == [SAVING_IDLE_S]


def test_a_store_that_is_down_costs_a_miss(tmp_path: Path) -> None:
    """Questions, saves and loads all end, with a reason that is counted."""
    (tmp_path / "kv").write_text("not a folder")
    with engine(tmp_path, seed=3) as each:
        assert each.look("a") == 0
        assert each.save("b")
        assert each.totals["failures"] == {
            "lookup Unavailable": 1,
            "save Unavailable": 1,
        }


def test_a_store_that_hangs_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that gets no answer ends in time, and so do questions when all who ask are stuck."""
    release = threading.Event()
    real = open_kv_store
    stores: list[Any] = []

    def opened(*args: Any, **kwargs: Any) -> Any:
        stores.append(real(*args, **kwargs))
        return stores[-1]

    monkeypatch.setattr(worker_module, "open_kv_store", opened)
    with (
        engine(tmp_path, seed=3) as writer,
        engine(tmp_path, timeout_s=0.3, lookup_s=0.2) as reader,
    ):
        writer.save("a")
        assert reader.look("b") == STOP
        assert reader.soon(lambda: early_of(reader, "b") == EARLY)
        for name in ("get", "exists"):

            def hang(*_: Any, **__: Any) -> None:
                release.wait(20)
                raise UnavailableError("gone")

            monkeypatch.setattr(stores[1], name, hang)
        waited_s = []
        reader.store.take(
            StoreStep(loads=[StoreLoad(request_id="b", tokens=range(STOP), block_ids=THERE)])
        )
        for idle in (False, True):
            reader.store.take(StoreStep(idle=idle))
            started_s = time.monotonic()
            reader.store.take_results()
            waited_s.append(time.monotonic() - started_s)
        # only a step that computes nothing waits for news, and not for long
        assert waited_s[0] < SHARED_IDLE_S <= waited_s[1] < 0.2
        assert reader.soon(lambda: "b" in reader.received)
        assert reader.invalid == set(THERE[EARLY * CHUNK // BLOCK : STOP // BLOCK])
        assert reader.totals["failures"] == {"load Timeout": 1}
        questions = [
            Lookup(prompt=prompt(f"q{n}", TOKENS), computed=0, speed=None) for n in range(4)
        ]
        reader.store.take(StoreStep(lookups=questions))
        time.sleep(0.3)
        # nobody is left to ask
        assert reader.look("last") == 0
        release.set()
        assert reader.soon(lambda: len(reader.news.found) == 6)


def test_kept_blocks_are_given_back_when_they_are_read(tmp_path: Path) -> None:
    """A finished request's blocks are told once: when its save ends, or at once if it has ended."""
    with engine(tmp_path, seed=3) as each:
        save = StoreSave(prompt=prompt("a", TOKENS), start=0, block_ids=HERE)
        each.store.take(StoreStep(kept=["a"], finished=["a"]))
        each.store.take(StoreStep(saves=[save]))
        assert each.soon(lambda: "a" in each.sent)
        assert each.save("b")
        assert each.sent == {"a"}
        each.store.take(StoreStep(kept=["b"], finished=["b"], number=7))
        assert each.soon(lambda: "b" in each.sent)
        assert each.news.steps == [7]


def test_dropped_blocks_are_read_no_more(tmp_path: Path) -> None:
    """What was preempted is not saved from blocks that others use, and too many saves are not kept waiting."""
    with engine(tmp_path, seed=3) as each:
        reading = each.store._writer._reading
        with reading:
            saves = [
                StoreSave(prompt=prompt(f"r{n}", [n, *TOKENS]), start=0, block_ids=HERE)
                for n in range(MAX_WAITING + 9)
            ]
            adding = threading.Thread(target=each.store.take, args=(StoreStep(saves=saves),))
            adding.start()
        adding.join()
        last = saves[MAX_WAITING - 5].prompt.request_id
        each.store.drop(StoreStep(dropped=[last]))
        assert each.soon(lambda: len(each.news.saved) == len(saves))
        failures = each.totals["failures"]
        assert set(failures) <= {"save QueueFull", "save Preempted"}
        assert failures["save Preempted"] == 1
        assert each.totals["tokens"]["saved"] % STOP == 0


def test_an_aborted_load_ends(tmp_path: Path) -> None:
    """A request that ends while its prefix is fetched is still told as received, once, as cancelled."""
    with engine(tmp_path, seed=3) as writer, engine(tmp_path) as reader:
        writer.save("a")
        assert reader.look("b") == STOP
        held = threading.Event()
        # the coders' only thread
        reader.coders.submit(held.wait, 10)
        load = StoreLoad(request_id="b", tokens=range(STOP), block_ids=THERE)
        reader.store.take(StoreStep(loads=[load]))
        reader.store.take(StoreStep(finished=["b"]))
        held.set()
        assert reader.soon(lambda: "b" in reader.received)
        # it may have been too late to stop
        assert set(reader.totals.get("failures", {})) <= {"load Cancelled"}
        reader.received.clear()
        assert reader.load("b", range(STOP))
        assert reader.totals["failures"]["load Expired"] == 1
        assert reader.invalid >= set(THERE[: STOP // BLOCK])


def test_a_cache_that_can_not_be_stored_answers_too() -> None:
    """Without a store that can be used every question is answered with nothing, and nothing is held."""
    closed = ClosedStore()
    save = StoreSave(prompt=prompt("b", TOKENS), start=0, block_ids=HERE)
    lookup = Lookup(prompt=prompt("a", TOKENS), computed=0, speed=None)
    closed.take(StoreStep(lookups=[lookup], saves=[save], kept=["b"], number=3))
    assert closed.take_results() == ({"b"}, set(), set())
    assert closed.take_news() == StoreNews(steps=[3], found={"a": 0}, saved={"b"})
    assert closed.take_news() is None
