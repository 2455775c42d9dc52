"""Real prompts, sent when they would arrive, and timed as a client sees them."""

import asyncio
import gzip
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
from tokenizers import Tokenizer

from kvserve_profiler import corpus

LENGTHS: Final = (500, 700, 1000, 1400, 2000)
WEIGHTS: Final = (3, 3, 2, 1, 1)
"""Prompts in tokens and how often each occurs: in the mean about 900."""
TIMEOUT_S: Final = 900.0
PREFILL_ONLY: Final[Mapping[str, Any]] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of a schedule.

    Attributes:
        at_s: When it arrives, from the start.
        prompt: Its tokens.
    """

    at_s: float
    prompt: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one request got, in seconds from its arrival.

    Attributes:
        at_s: When it arrived.
        tokens: Of its prompt.
        prefill_s: To the prefill engine's answer.
        ttft_s: To the first token.
        jct_s: To the last.
        text: What was generated.
        error: Empty, or what went wrong.
    """

    at_s: float
    tokens: int
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    jct_s: float = 0.0
    text: str = ""
    error: str = ""


def course(count: int, per_s: float, seed: int) -> list[tuple[float, int]]:
    """Return when requests arrive, as a Poisson process, and how many tokens each has; a function of its arguments.

    Args:
        count: How many.
        per_s: How many a second in the mean.
        seed: Of everything random.
    """
    dice = random.Random(seed)
    arrivals_s = [0.0]
    while len(arrivals_s) < count:
        arrivals_s.append(arrivals_s[-1] + dice.expovariate(per_s))
    # every length as often as its weight says, in a random order: few requests then say more
    lengths = _shares(count)
    dice.shuffle(lengths)
    return list(zip(arrivals_s, lengths, strict=True))


def schedule(
    documents: Sequence[Sequence[int]], count: int, per_s: float, seed: int
) -> tuple[Request, ...]:
    """Return the requests of a `course`, with prompts.

    Args:
        documents: Tokens of texts; each prompt is a piece of one.
        count: How many.
        per_s: How many a second in the mean.
        seed: Of everything random.
    """
    dice = random.Random(seed)
    return tuple(
        Request(at_s=at_s, prompt=_piece(documents, length, dice))
        for at_s, length in course(count, per_s, seed)
    )


def _shares(count: int) -> list[int]:
    """Return so many lengths, each as often as its weight says, by largest remainders."""
    total = sum(WEIGHTS)
    exact = [count * weight / total for weight in WEIGHTS]
    whole = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for index in order[: count - sum(whole)]:
        whole[index] += 1
    return [length for length, times in zip(LENGTHS, whole, strict=True) for _ in range(times)]


def _piece(documents: Sequence[Sequence[int]], length: int, dice: random.Random) -> tuple[int, ...]:
    """Return a piece of one of the documents; of all together where each is too short."""
    whole = [token for document in documents for token in document]
    able = [document for document in documents if len(document) >= length] or [
        whole * (1 + length // len(whole))
    ]
    document = able[dice.randrange(len(able))]
    start = dice.randrange(len(document) - length + 1)
    return tuple(document[start : start + length])


def texts(folder: Path) -> dict[str, str]:
    """Return texts to make prompts of: those of the project's data folder, else the profiler's built-in corpus.

    Args:
        folder: Holds ``wikitext2/test.txt``, ``humaneval/HumanEval.jsonl.gz`` and ``gsm8k/test.jsonl``, or nothing.
    """
    if not folder.is_dir():
        return dict(zip(corpus.NAMES, corpus.documents(), strict=False))
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        code = "\n".join(d["prompt"] + d["canonical_solution"] for d in map(json.loads, file))
    with (folder / "gsm8k" / "test.jsonl").open() as file:
        sums = "\n".join(f"{d['question']} {d['answer']}" for d in map(json.loads, file))
    prose = (folder / "wikitext2" / "test.txt").read_text()
    return {"wikitext-2": prose[:200_000], "humaneval": code[:100_000], "gsm8k": sums[:100_000]}


def mean_tokens() -> float:
    """Return the mean length of a prompt."""
    return sum(n * w for n, w in zip(LENGTHS, WEIGHTS, strict=True)) / sum(WEIGHTS)


def tokens(named: Mapping[str, str], model: Path) -> list[list[int]]:
    """Return the tokens of texts.

    Args:
        named: Texts by name.
        model: Folder with the model's tokenizer.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in named.values()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """The way of a request.

    Attributes:
        prefill: URL of the engine that it goes to first.
        decode: URL of the engine that goes on; None to have the first do it all.
        early: Host and port at which the prefill engine serves transfers: the decode engine is asked at the same time
            and pulls while the prefill goes on. None: it is asked when the prefill has ended.
    """

    prefill: str
    decode: str | None = None
    early: tuple[str, int] | None = None


async def run(
    requests: Sequence[Request], route: Route, *, max_tokens: int, one_by_one: bool = False
) -> list[Timing]:
    """Send each request when it arrives, whatever became of those before it, and wait for all.

    Args:
        requests: What to send.
        route: Where to.
        max_tokens: How many tokens to generate.
        one_by_one: Send each when the one before has ended.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        if one_by_one:
            return [await send(client, r, route, max_tokens=max_tokens) for r in requests]
        start_s = time.perf_counter()

        async def one(request: Request) -> Timing:
            await asyncio.sleep(request.at_s - (time.perf_counter() - start_s))
            return await send(client, request, route, max_tokens=max_tokens)

        return list(await asyncio.gather(*(one(request) for request in requests)))


async def send(
    client: httpx.AsyncClient, request: Request, route: Route, *, max_tokens: int
) -> Timing:
    """Send one request as a router would, and time it."""
    body: dict[str, Any] = {
        "model": "m",
        "prompt": list(request.prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    timing = Timing(at_s=request.at_s, tokens=len(request.prompt))
    start_s = time.perf_counter()

    async def prefill(more: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
        first = body | {"max_tokens": 1, "kv_transfer_params": dict(PREFILL_ONLY) | dict(more)}
        answer = await client.post(f"{route.prefill}/v1/completions", json=first)
        answer.raise_for_status()
        params = answer.json().get("kv_transfer_params")
        if route.early is None and not params:
            raise ValueError("the prefill's answer does not say where its KV is")
        return params or {}, time.perf_counter() - start_s

    async def generate(params: Mapping[str, Any] | None) -> tuple[float, list[str]]:
        asked = body | {"stream": True} | ({"kv_transfer_params": params} if params else {})
        first_s = 0.0
        pieces = []
        async for piece in _stream(client, route.decode or route.prefill, asked):
            first_s = first_s or time.perf_counter() - start_s
            pieces.append(piece)
        return first_s, pieces

    try:
        prefill_s = 0.0
        if route.decode is None:
            first_s, pieces = await generate(None)
        elif route.early is None:
            params, prefill_s = await prefill({})
            first_s, pieces = await generate(params)
        else:
            transfer = {"transfer_id": f"xfer-{uuid.uuid4()}"}
            host, port = route.early
            pull = {"do_remote_prefill": True, "do_remote_decode": False}
            (_, prefill_s), (first_s, pieces) = await asyncio.gather(
                prefill(transfer),
                generate(pull | transfer | {"remote_host": host, "remote_port": port}),
            )
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return replace(timing, error=f"{type(error).__name__}: {error}"[:200])
    end_s = time.perf_counter() - start_s
    if not pieces:
        return replace(timing, error="no token came", jct_s=end_s)
    return replace(timing, prefill_s=prefill_s, ttft_s=first_s, jct_s=end_s, text="".join(pieces))


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yield the generated text of a stream of server-sent events."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            for choice in event.get("choices", []):
                # a token may have no text of its own
                yield choice.get("text") or ""
