"""A real vLLM server that hands over to itself, with caches that are carried as whole blocks."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import opaque_models
from vllm_servers import Plan, Server, hand_over, make_prompt, prefill, start

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]

MAX_START_S = 240.0
STEP = 128
"""Tokens that an engine computes at once."""


@dataclass(frozen=True)
class Case:
    """A kind of model, and how it is served."""

    make: Callable[[Path], Path]
    opaque: str
    arguments: tuple[str, ...] = ()


CASES = {
    "recurrent": Case(opaque_models.make_recurrent, "RecurrentState"),
    "windowed-fp8": Case(
        opaque_models.make_windowed,
        "QuantisedCache",
        ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8"),
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, Server]]:
    """A server that prefills for itself."""
    folder = tmp_path_factory.mktemp("opaque")
    plan = Plan(
        role="kv_both",
        core=max(os.sched_getaffinity(0)),
        arguments=(
            "--max-num-batched-tokens",
            str(STEP),
            "--max-num-seqs",
            "8",
            *request.param.arguments,
        ),
    )
    server = start(plan, request.param.make(folder / "model"), folder)
    try:
        server.wait_ready(MAX_START_S)
        yield request.param, server
    finally:
        server.stop()


def test_tokens_equal_a_single_servers(served: tuple[Case, Server]) -> None:
    """Handed over, prompts of some blocks and windows go on as alone, and nothing is computed anew."""
    case, server = served
    # alone, too, the last token is computed by itself: a kernel for one token differs from one for many;
    # and a prompt of one token as the first of all is an illegal instruction to vLLM's cache of 8 bits
    lengths = (1 + 3 * STEP, 1 + 2 * STEP, 1 + STEP, 1)
    for length in lengths:
        prompt = make_prompt(length, seed=length)
        alone = server.text(prompt, 8)
        assert hand_over(server, server, prompt, 8) == alone, length
    fetched = server.count("vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"')
    # all but each prompt's last token
    assert fetched == sum(length - 1 for length in lengths)
    assert server.count("vllm:kvserve_transfer_failures_total") == 0
    assert server.metrics("vllm:kvserve_opaque_cache")
    assert server.count("vllm:kvserve_opaque_cache", f'reason="{case.opaque}"') == 1


def test_lost_blocks_are_recomputed(served: tuple[Case, Server]) -> None:
    """A hand-over that nobody serves is computed anew in all groups, with the same tokens."""
    _, server = served
    prompt = make_prompt(1 + 2 * STEP, seed=11)
    alone = server.text(prompt, 8)
    params = prefill(server, prompt) | {"remote_port": 1}
    assert server.text(prompt, 8, kv_transfer_params=params) == alone
    assert server.count("vllm:kvserve_transfer_failures_total", 'reason="PeerLost"') == 1
