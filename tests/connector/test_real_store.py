"""Two real vLLM servers with one KV store: what one has computed the other fetches, and what is wrong is computed."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from vllm_servers import Plan, Server, hand_over, make_prompt, start

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]


def soon(holds: Callable[[], object], timeout_s: float = 20.0) -> bool:
    """Wait until a call returns something true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := holds()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return bool(found)


def is_idle(server: Server) -> bool:
    """Tell whether a server holds no blocks."""
    return server.count("vllm:kv_cache_usage_perc") == 0


@dataclass
class Servers:
    """A server that saves, one that only reads, and the folder that they share."""

    writer: Server
    reader: Server
    folder: Path

    def values(self) -> list[Path]:
        """Return the stored values, the latest last."""
        files = [path for path in self.folder.rglob("*-*") if path.is_file()]
        return sorted(files, key=lambda path: path.stat().st_mtime_ns)

    def save(self, prompt: str) -> str:
        """Have a prompt computed and saved; return the text."""
        before = self.tokens(self.writer, "saved")
        text = self.writer.text(prompt)
        steps = len(prompt.split()) // 16 * 16
        assert soon(lambda: self.tokens(self.writer, "saved") == before + steps)
        return text

    def tokens(self, server: Server, outcome: str) -> float:
        """Return a count of tokens."""
        return server.count("vllm:kvserve_store_tokens_total", f'outcome="{outcome}"')

    def fetched(self) -> float:
        """Return how many prompt tokens the reader did not compute."""
        return self.reader.count(
            "vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"'
        )

    def has_fetched(self, tokens: float) -> bool:
        """Tell whether it is so many by now."""
        return self.fetched() == tokens

    def failures(self, reason: str) -> float:
        """Return how many loads failed for a reason."""
        return self.reader.count(
            "vllm:kvserve_transfer_failures_total", 'direction="load"', f'reason="{reason}"'
        )


@pytest.fixture(scope="module")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Start both; what is there is fetched, however fast they compute."""
    folder = tmp_path_factory.mktemp("store")
    store = folder / "kv"
    settings = {
        "url": store.as_uri(),
        "profile": "lossless",
        "recompute": False,
        "chunk_tokens": 256,
    }
    cores = sorted(os.sched_getaffinity(0))
    started = [
        start(Plan(role=role, core=core, extra={"store": settings}), tiny_model, folder)
        for role, core in (("kv_both", cores[0]), ("kv_consumer", cores[-1]))
    ]
    try:
        for server in started:
            server.wait_ready()
        yield Servers(started[0], started[1], store)
    finally:
        for server in started:
            server.stop()


def test_another_engine_fetches_what_one_computed(servers: Servers) -> None:
    """Tokens are those of a server without store, for the same prompt, a longer one, and one that ends otherwise."""
    prompt = make_prompt(700, seed=1)
    alone = servers.save(prompt)
    longer, other = f"{prompt} {make_prompt(50, seed=2)}", " ".join(prompt.split()[:600])
    for text, hit in ((prompt, 688), (longer, 688), (f"{other} {make_prompt(90, 3)}", 592)):
        before = servers.fetched()
        # under a salt of its own nothing is found
        expected = alone if text is prompt else servers.reader.text(text, cache_salt="alone")
        assert servers.fetched() == before
        assert servers.reader.text(text) == expected
        assert soon(partial(servers.has_fetched, before + hit))


def test_a_whole_prompt_may_come_from_the_store(servers: Servers) -> None:
    """Of a prompt that ends with a chunk only the last token is computed."""
    prompt = make_prompt(512, seed=11)
    alone, before = servers.save(prompt), servers.fetched()
    assert servers.reader.text(prompt) == alone
    # vLLM counts that one on either side
    assert soon(lambda: servers.fetched() >= before + 511)


def test_a_damaged_value_is_computed_and_removed(servers: Servers) -> None:
    """What is whole before a flipped bit is used, the rest is computed, and the value is gone."""
    prompt = make_prompt(700, seed=21)
    alone = servers.save(prompt)
    second = servers.values()[-2]
    content = bytearray(second.read_bytes())
    content[-1000] ^= 16
    second.write_bytes(content)
    before = servers.failures("ChecksumMismatch"), servers.tokens(servers.reader, "loaded")
    assert servers.reader.text(prompt) == alone
    assert soon(lambda: servers.failures("ChecksumMismatch") == before[0] + 1)
    assert servers.tokens(servers.reader, "loaded") == before[1] + 256
    assert not second.exists()
    # found up to there, and right again
    assert servers.reader.text(prompt) == alone
    assert soon(lambda: servers.tokens(servers.reader, "loaded") == before[1] + 512)


def test_a_store_that_is_down_costs_nothing_but_the_hit(servers: Servers) -> None:
    """Without its store a server computes; when it is back prefixes are fetched again."""
    prompt = make_prompt(400, seed=31)
    alone = servers.save(prompt)
    aside = servers.folder.with_name("aside")
    servers.folder.rename(aside)
    servers.folder.write_text("a file where the folder was")
    for server in (servers.reader, servers.writer):
        assert server.text(prompt) == alone
        failures = partial(server.count, "vllm:kvserve_transfer_failures_total")
        assert soon(partial(failures, 'direction="lookup"', 'reason="Unavailable"'))
    servers.folder.unlink()
    aside.rename(servers.folder)
    before = servers.fetched()
    # it is left alone for a while
    assert soon(lambda: servers.reader.text(prompt) == alone and servers.fetched() > before, 30)


def test_with_a_hand_over(servers: Servers) -> None:
    """A prefill fetches the start of its prompt, computes the rest, and hands all of it over."""
    prompt = make_prompt(500, seed=41)
    servers.save(prompt)
    longer = f"{prompt} {make_prompt(200, seed=42)}"
    alone = servers.reader.text(longer, cache_salt="alone")
    loaded, asked = (
        servers.tokens(server, outcome)
        for server, outcome in ((servers.writer, "loaded"), (servers.reader, "asked"))
    )
    assert hand_over(servers.writer, servers.reader, longer) == alone
    assert soon(lambda: servers.tokens(servers.writer, "loaded") == loaded + 496)
    # the consumer had no reason to ask
    assert servers.tokens(servers.reader, "asked") == asked


def test_nothing_is_left_behind(servers: Servers) -> None:
    """When all requests have ended no blocks are held, and what was done with the store can be read."""
    for server in (servers.writer, servers.reader):
        assert soon(partial(is_idle, server))
    assert servers.tokens(servers.reader, "saved") == 0
    assert servers.reader.count(
        "vllm:kvserve_store_decisions_total", 'action="fetch"', 'reason="AlwaysFetch"'
    )
    assert servers.reader.count(
        "vllm:kvserve_store_operations_total", 'operation="get"', 'outcome="Hit"'
    )
    for direction, server in (("save", servers.writer), ("load", servers.reader)):
        marks = (f'direction="{direction}"', 'profile="lossless"')
        native, wire = (
            server.count(f"vllm:kvserve_{name}_total", *marks)
            for name in ("native_bytes", "wire_bytes")
        )
        assert native > wire > 0
