"""Real requests through the router, timed as a client sees them."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one request got.

    Attributes:
        prompt: The name of its prompt.
        text: The generated text.
        ttft_s: Seconds to the first token.
        jct_s: Seconds to the last token, the job's completion time.
    """

    prompt: str
    text: str
    ttft_s: float
    jct_s: float


def ask(router: str, model: str, name: str, prompt: str, *, max_tokens: int) -> Answer:
    """Send one prompt, greedy and streamed, and time it.

    Raises:
        httpx.HTTPError: The router did not answer, or with an error.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "ignore_eos": True,
    }
    start_s = time.perf_counter()
    first_s = 0.0
    pieces: list[str] = []
    with httpx.stream("POST", f"{router}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        if response.is_error:
            response.read()
            response.raise_for_status()
        for piece in _pieces(response.iter_lines()):
            first_s = first_s or time.perf_counter()
            pieces.append(piece)
    end_s = time.perf_counter()
    return Answer(
        prompt=name,
        text="".join(pieces),
        ttft_s=(first_s or end_s) - start_s,
        jct_s=end_s - start_s,
    )


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Yield the generated text of a stream of server-sent events."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise httpx.HTTPError(f"the server ended the stream: {event['error']}")
        for choice in event.get("choices", []):
            if choice.get("text"):
                yield choice["text"]
