"""The scheduler's side of a KV store: which requests ask it, what they fetch, and which prompts are saved."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

import numpy as np
from vllm.v1.request import RequestStatus

from kvserve_connector.recompute import Speedometer
from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.keys import STEP_TOKENS
from kvserve_connector.stores.messages import (
    Lookup,
    Prompt,
    StoreLoad,
    StoreNews,
    StoreSave,
    StoreStep,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

LEAST_TOKENS: Final = 64
"""A shorter prompt is computed before a store answers."""
MAX_STEPS: Final = 16
"""Steps under way whose time is measured."""


class _Save(Enum):
    """What becomes of a prompt's KV."""

    OPEN = auto()
    """It is not computed yet."""
    READING = auto()
    """The worker reads the request's blocks."""
    NEVER = auto()
    """It is done, or must not be saved."""


@dataclass(slots=True)
class _Asked:
    """One request.

    Attributes:
        request: vLLM's.
        since_s: When the store was asked; None before.
        start: What was computed then.
        found: The store's answer, in tokens from the prompt's start on; None before it is there.
        loaded: Tokens that were fetched.
        save: What becomes of its KV.
    """

    request: "Request"
    since_s: float | None = None
    start: int = 0
    found: int | None = None
    loaded: int = 0
    save: _Save = _Save.OPEN


class StoreRequests:
    """All requests of one engine, as far as they have to do with its store; does no I/O.

    Args:
        config: Of the store.
        saves: Whether this engine saves what it computes.
        prompt: Returns a request's prompt; None if it has no identity.
        now_s: A clock that never goes back.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        saves: bool,
        prompt: "Callable[[Request], Prompt | None]",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup_s = config.lookup_s
        self._saves = saves
        self._prompt = prompt
        self._now_s = now_s
        self._asked: dict[str, _Asked] = {}
        self._step = StoreStep()
        self._meter = Speedometer()
        self._steps: OrderedDict[int, tuple[float, list[range]]] = OrderedDict()
        self._computing: dict[int, list[StoreSave]] = {}
        self._number = 0
        self._ended_s = 0.0

    def arrived(self, request: "Request") -> None:
        """Take note of a new request."""
        if request.num_prompt_tokens >= LEAST_TOKENS:
            self._asked[request.request_id] = _Asked(request)

    def foreign(self, request: "Request") -> None:
        """Take note that a request's KV comes from another engine: it is not ours to store."""
        asked = self._asked.get(request.request_id)
        if asked is not None:
            asked.save = _Save.NEVER

    def matched_tokens(self, request: "Request", computed: int) -> int | None:
        """Return how many tokens beyond the computed ones are to be fetched; None while the store is being asked."""
        asked = self._asked.get(request.request_id)
        if (
            asked is None
            or request.get_skip_reading_prefix_cache()
            or request.num_prompt_tokens - computed < LEAST_TOKENS
        ):
            return 0
        if asked.since_s is None or (asked.found and computed < asked.start):
            return self._ask(asked, computed)
        if asked.found is None:
            if self._now_s() - asked.since_s < self._lookup_s:
                return None
            self._step.late += 1
            asked.found = 0
        return max(0, asked.found - computed)

    def allocated(self, request: "Request", block_ids: "list[int]", external: int) -> None:
        """Fetch what `matched_tokens` offered, now that the blocks are there."""
        asked = self._asked.get(request.request_id)
        if asked is None or not asked.found or not external:
            return
        asked.loaded = asked.found
        self._step.loads.append(
            StoreLoad(
                request_id=request.request_id,
                tokens=range(asked.found - external, asked.found),
                block_ids=tuple(block_ids),
            )
        )

    def scheduled(self, output: "SchedulerOutput") -> None:
        """Take note of a step that is about to run: prompts that it completes will be saved after it."""
        for request_id, asked in self._asked.items():
            if asked.request.status == RequestStatus.PREEMPTED and asked.save is _Save.READING:
                asked.save = _Save.NEVER
                self._drop(request_id)
        if not output.total_num_scheduled_tokens:
            self._step.idle = True
            return
        parts: list[range] = []
        saves: list[StoreSave] = []
        for request_id, count in output.num_scheduled_tokens.items():
            if (each := self._asked.get(request_id)) is None:
                continue
            computed = each.request.num_computed_tokens
            parts.append(range(computed, computed + count))
            if each.save is _Save.OPEN and computed + count >= each.request.num_prompt_tokens:
                saves += self._saved(each, output)
        if saves or sum(map(len, parts)) >= STEP_TOKENS:
            self._number += 1
            self._step.number = self._number
            self._computing[self._number] = saves
            self._steps[self._number] = (self._now_s(), parts)
            if len(self._steps) > MAX_STEPS:
                self._steps.popitem(last=False)

    def finished(self, request: "Request") -> bool:
        """Say whether a finished request's blocks must be kept until they are read."""
        asked = self._asked.pop(request.request_id, None)
        if asked is None:
            return False
        self._step.finished.append(request.request_id)
        if asked.save is not _Save.READING:
            return False
        self._step.kept.append(request.request_id)
        return True

    def heard(self, news: StoreNews) -> None:
        """Take note of what the worker answers."""
        now_s = self._now_s()
        for number in news.steps:
            # not before: what a step computes may still be on its way into the cache
            self._step.saves += self._computing.pop(number, [])
            if (step := self._steps.pop(number, None)) is not None:
                # steps that wait for one before them are not slow
                self._meter.observe(now_s - max(step[0], self._ended_s), step[1])
                self._ended_s = now_s
        for request_id, tokens in news.found.items():
            if (asked := self._asked.get(request_id)) is not None and asked.found is None:
                asked.found = min(tokens, asked.request.num_prompt_tokens)
        for request_id in news.failed:
            if (asked := self._asked.get(request_id)) is not None:
                # once: what was not there, or damaged, is not asked for again
                asked.found = asked.loaded = 0
        for request_id in news.saved:
            if (asked := self._asked.get(request_id)) is not None:
                asked.save = _Save.NEVER

    def take_step(self) -> StoreStep:
        """Return the news since the last call."""
        step, self._step = self._step, StoreStep()
        return step

    def _ask(self, asked: _Asked, computed: int) -> int | None:
        prompt = self._prompt(asked.request)
        if prompt is None:
            asked.since_s, asked.found, asked.save = self._now_s(), 0, _Save.NEVER
            return 0
        asked.since_s, asked.start, asked.found = self._now_s(), computed, None
        self._step.lookups.append(Lookup(prompt=prompt, computed=computed, speed=self._meter.speed))
        return None

    def _saved(self, asked: _Asked, output: "SchedulerOutput") -> list[StoreSave]:
        """Return what is to be saved of a prompt that is being completed."""
        prompt = self._prompt(asked.request) if self._saves else None
        if prompt is None or asked.request.num_prompt_tokens - asked.loaded < STEP_TOKENS:
            asked.save = _Save.NEVER
            return []
        asked.save = _Save.READING
        assert output.kv_connector_block_state is not None
        (blocks,) = output.kv_connector_block_state.resolve_block_ids(asked.request.request_id)
        return [StoreSave(prompt=prompt, start=asked.loaded, block_ids=tuple(blocks))]

    def _drop(self, request_id: str) -> None:
        """Have nobody read a request's blocks any more."""
        for saves in (self._step.saves, *self._computing.values()):
            saves[:] = [save for save in saves if save.prompt.request_id != request_id]
        self._step.dropped.append(request_id)


def pack_tokens(token_ids: "list[int]") -> bytes:
    """Return token ids as `Prompt` has them."""
    return np.asarray(token_ids, dtype=np.int32).tobytes()
