"""Prompts of `store_bench`, no two of which begin alike, and the time to the first token of an answer."""

import asyncio
import random
from collections.abc import Sequence
from typing import Final

import httpx

import pd_load
import pd_servers

SUFFIX_TOKENS: Final = 16
"""New ones behind the prefix."""


class Prompts:
    """Pieces of documents.

    Args:
        documents: Tokens of the texts.
        seed: Of the places.
    """

    def __init__(self, documents: Sequence[Sequence[int]], seed: int = 11) -> None:
        self._documents = documents
        self._dice = random.Random(seed)

    def new(self, tokens: int) -> tuple[int, ...]:
        """Return tokens of a text, from a place that no other prompt begins at."""
        able = [document for document in self._documents if len(document) > tokens]
        document = self._dice.choice(able)
        start = self._dice.randrange(len(document) - tokens)
        return tuple(document[start : start + tokens])

    def longer(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """Return a prompt with new tokens behind it."""
        return prompt + self.new(SUFFIX_TOKENS)


def first_token_s(engine: pd_servers.Engine, prompt: tuple[int, ...]) -> float:
    """Return the seconds from asking an engine to the first token of its answer.

    Raises:
        ServerError: The request failed.
    """

    async def one() -> pd_load.Timing:
        async with httpx.AsyncClient(timeout=pd_load.TIMEOUT_S) as client:
            request = pd_load.Request(at_s=0.0, prompt=prompt)
            route = pd_load.Route(prefill=engine.url)
            return await pd_load.send(client, request, route, max_tokens=1)

    timing = asyncio.run(one())
    if timing.error:
        raise pd_servers.ServerError(f"a request failed: {timing.error}")
    return timing.ttft_s
