"""LMCache in the place of KVServe, for `store_bench`: its connector in vLLM, its servers, the same Redis.

LMCache's engines give KV to a server on their own node (here on the engine's core, over shared memory), which keeps it
in memory and puts it into Redis. Here one engine computes each prefix, and the other, whose server never had it, asks
for it once: what is read twice would come from its node's memory. Its server hands over by the engines (mode
``engine_driven``), has 1 GiB of memory from the start on, and pieces of 128 tokens in place of 256, so that more of a
short prefix is a whole piece; the rest is as LMCache has it by default.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import redis

import pd_servers
from pd_links import End, Link, inside
from peers_fetch import fetch
from store_prompts import Prompts, first_token_s
from store_rows import LMCACHE, Row, row_of
from testcluster.process import die_with_parent, system_env

PACKAGES: Final = ("lmcache-whole", "aiofile", "aiofiles", "caio", "nvtx", "sortedcontainers")
PIECE_TOKENS: Final = 128
MEMORY_GIB: Final = 1
PORT: Final = 5555
"""Of each server: every namespace has its own ports."""
MOST_START_S: Final = 60.0
QUIET_S: Final = 0.6
"""For so long nothing was stored: then a prefix is there."""
MOST_WAIT_S: Final = 60.0
_READY: Final = "server is running"


def measure(
    link: Link,
    redis_port: int,
    model: Path,
    documents: Sequence[Sequence[int]],
    folder: Path,
    *,
    prefixes: Sequence[int],
    rates_mbit: Sequence[float | None],
    repeats: int,
    max_tokens: int,
) -> Iterator[Row]:
    """Store prefixes with one engine and read them with the other.

    Args:
        link: Both namespaces.
        redis_port: Of the Redis, on this side of both.
        model: Folder of the model.
        documents: Tokens of the texts that prompts are made of.
        folder: For logs.
        prefixes: In tokens.
        rates_mbit: Of the wires between engines and Redis, as of `Link.shape_wires`.
        repeats: How many prefixes of a length are read over each link.
        max_tokens: Most tokens of a prompt and its answer.

    Raises:
        FetchError: LMCache can't be had.
        ServerError: An engine or a server does not do what it must.
    """
    paths = [str(fetch(name)) for name in PACKAGES]
    prompts = Prompts(documents, seed=12)
    client = redis.Redis(port=redis_port)
    with _running(link, redis_port, model, folder, paths, max_tokens) as (writer, reader):
        for engine in (writer, reader):
            first_token_s(engine, prompts.new(500))
        for mbit in rates_mbit:
            link.shape_wires(None)
            stored: dict[int, list[tuple[int, ...]]] = {}
            # one more, for the first fetch over a new link
            for prefix in (prefixes[0], *(p for p in prefixes for _ in range(repeats))):
                prompt = prompts.new(prefix)
                _put(writer, prompt, client)
                stored.setdefault(prefix, []).append(prompt)
            link.shape_wires(mbit)
            first_token_s(reader, prompts.longer(stored[prefixes[0]].pop()))
            for prefix, every in stored.items():
                seconds = [first_token_s(reader, prompts.longer(prompt)) for prompt in every]
                yield row_of("redis", mbit, prefix, LMCACHE, seconds)


@contextmanager
def _running(
    link: Link,
    redis_port: int,
    model: Path,
    folder: Path,
    paths: Sequence[str],
    max_tokens: int,
) -> Iterator[list[pd_servers.Engine]]:
    """Start a server and an engine in each namespace, on one core, and end them."""
    cores = sorted(os.sched_getaffinity(0))
    folder.mkdir(parents=True, exist_ok=True)
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://localhost",
            "lmcache.mp.port": PORT,
        },
    }
    env = {"PYTHONPATH": os.pathsep.join(paths), "DO_NOT_TRACK": "1"}
    with ExitStack() as stack:
        for end, core in zip(link.ends, (cores[0], cores[-1]), strict=True):
            stack.enter_context(_server(end, core, redis_port, folder, env))
        engines = []
        for end, core in zip(link.ends, (cores[0], cores[-1]), strict=True):
            engine = pd_servers.start_engine(
                end, core, transfer, model, folder, max_tokens=max_tokens, env=env
            )
            stack.callback(engine.stop)
            engines.append(engine)
        for engine in engines:
            engine.wait_ready()
        yield engines


@contextmanager
def _server(
    end: End, core: int, redis_port: int, folder: Path, env: dict[str, str]
) -> Iterator[None]:
    """Start a namespace's server, wait until it serves, and end it."""
    remote = {"type": "resp", "host": end.here, "port": redis_port}
    command = inside(
        end,
        *("taskset", "-c", str(core), sys.executable, "-m", "lmcache.v1.multiprocess.server"),
        *("--host", "localhost", "--port", str(PORT), "--chunk-size", str(PIECE_TOKENS)),
        *("--l1-size-gb", str(MEMORY_GIB), "--no-l1-use-lazy", "--eviction-policy", "LRU"),
        *("--supported-transfer-mode", "engine_driven", "--shm-name", f"lmcache-{end.name}"),
        *("--disable-observability", "--l2-adapter", json.dumps(remote)),
    )
    log = folder / f"{end.name}-server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=system_env() | {"OMP_NUM_THREADS": "1"} | env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        _wait(lambda: _READY in log.read_text(errors="replace"), MOST_START_S, f"LMCache: {log}")
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(pd_servers.MOST_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _put(engine: pd_servers.Engine, prompt: tuple[int, ...], client: redis.Redis) -> None:
    """Have a prefix computed, and wait until its pieces are in Redis and no more come."""
    last = before = client.dbsize()
    first_token_s(engine, prompt)
    changed_s = time.monotonic()

    def settled() -> bool:
        nonlocal last, changed_s
        now = client.dbsize()
        if now != last:
            last, changed_s = now, time.monotonic()
        return last != before and time.monotonic() - changed_s >= QUIET_S

    _wait(settled, MOST_WAIT_S, "LMCache stores nothing")


def _wait(holds: Callable[[], bool], most_s: float, what: str) -> None:
    deadline_s = time.monotonic() + most_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise pd_servers.ServerError(f"not within {most_s:g} s: {what}")
        time.sleep(0.1)
