"""What is handed over: a prefill that is kept, and a fetch of it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvserve_connector.remote import Remote


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """A prefill for a consumer that has arrived in this engine, and may be waiting or running.

    Attributes:
        request_id: The request's name in this engine.
        transfer_id: The name by which a router has told its consumer of it before it began; None if it will not.
        tokens: Tokens whose KV will be there.
        prompt_digest: See `prompt_digest`.
        workload: Its workload class.
    """

    request_id: str
    transfer_id: str | None = None
    tokens: int
    prompt_digest: str
    workload: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a running prefill is when the engine step that this comes with has ended.

    Attributes:
        request_id: The request's name in this engine.
        block_ids: For each group of the engine the request's blocks.
        tokens: Tokens at the prompt's start whose KV is in them then.
        before: Tokens whose KV was in them before that step.
    """

    request_id: str
    block_ids: tuple[tuple[int, ...], ...]
    tokens: int
    before: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A finished prefill whose blocks are kept for its consumer.

    Attributes:
        request_id: The request's name in this engine.
        tokens: Tokens whose KV is there.
        prompt_digest: See `prompt_digest`.
        block_ids: For each group of the engine the request's blocks, see `kvserve_connector.groups.Group.held`.
        workload: Its workload class.
        model_s: Seconds from its arrival to the end of its prefill.
    """

    request_id: str
    tokens: int
    prompt_digest: str
    block_ids: tuple[tuple[int, ...], ...]
    workload: str
    model_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """KV to fetch from another engine.

    Attributes:
        request_id: The request's name in this engine.
        remote: Where its KV is.
        tokens: Which tokens are wanted; those before are here already.
        prompt_digest: See `prompt_digest`.
        block_ids: The request's blocks here, likewise.
        workload: Its workload class.
    """

    request_id: str
    remote: Remote
    tokens: range
    prompt_digest: str
    block_ids: tuple[tuple[int, ...], ...]
    workload: str


def prompt_digest(token_ids: Sequence[int], extras: Iterable[str] = ()) -> str:
    """Return the identity of what a prompt's KV was computed from.

    Both ends compare it, so that a router that mixes up two requests can't lead to another prompt's KV.

    Args:
        token_ids: The prompt.
        extras: What else decides the KV: adapter names, hashes of images, in order.
    """
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=16)
    for extra in extras:
        digest.update(b"\0" + extra.encode())
    return digest.hexdigest()
