"""A real vLLM server that hands over to itself under a secret and TLS, with caches that are carried as whole blocks."""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import opaque_models
from kvserve_connector.protocol import Kind, pack_header
from members import NAME, Members
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


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server for each case, each its own peer only by the secret and a certificate; they start side by side."""
    cores = sorted(os.sched_getaffinity(0))
    started: dict[str, Server] = {}
    try:
        for index, (name, case) in enumerate(CASES.items()):
            folder = tmp_path_factory.mktemp("opaque")
            files = Members(folder / "members").with_tls(secret=True)
            plan = Plan(
                role="kv_both",
                core=cores[index % len(cores)],
                extra={key: str(path) for key, path in dataclasses.asdict(files).items()}
                | {"tls_server_name": NAME},
                arguments=(
                    "--max-num-batched-tokens",
                    str(STEP),
                    "--max-num-seqs",
                    "8",
                    *case.arguments,
                ),
            )
            started[name] = start(plan, case.make(folder / "model"), folder)
        for server in started.values():
            server.wait_ready(MAX_START_S)
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture(params=list(CASES))
def served(request: pytest.FixtureRequest, servers: dict[str, Server]) -> tuple[Case, Server]:
    """One of them."""
    return CASES[request.param], servers[request.param]


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


def test_a_stranger_gets_no_kv(served: tuple[Case, Server]) -> None:
    """Who asks for KV in plain words is turned away and counted, and a peer still gets it."""
    _, server = served
    prompt = make_prompt(1 + STEP, seed=12)
    alone = server.text(prompt, 8)
    params = prefill(server, prompt)
    failed = server.count("vllm:kvserve_transfer_failures_total")
    pull = json.dumps({"request_id": params["remote_request_id"]}).encode()
    with socket.create_connection(("127.0.0.1", params["remote_port"]), timeout=10) as stranger:
        stranger.sendall(pack_header(Kind.PULL, len(pull)) + pull)
        with contextlib.suppress(ConnectionResetError):
            assert len(stranger.recv(1 << 16)) < 1 << 12
    assert server.text(prompt, 8, kv_transfer_params=params) == alone
    assert server.count("vllm:kvserve_transfer_failures_total", 'reason="Unauthenticated"') == 1
    assert server.count("vllm:kvserve_transfer_failures_total") == failed + 1
