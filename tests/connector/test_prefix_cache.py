"""Two real servers that keep blocks of earlier requests, under MultiConnector: only what is missing travels."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_servers import Plan, Server, hand_over, make_model, make_prompt, start

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A producer and a consumer with prefix caching, under MultiConnector, and no controller."""
    folder = tmp_path_factory.mktemp("cached")
    model = make_model(folder / "model")
    cores = sorted(os.sched_getaffinity(0))
    both = [
        start(
            Plan(role=role, core=core, prefix_caching=True, beside=(_example(folder / role),)),
            model,
            folder,
        )
        for role, core in (("kv_producer", cores[0]), ("kv_consumer", cores[-1]))
    ]
    try:
        for server in both:
            server.wait_ready()
        yield both[0], both[1]
    finally:
        for server in both:
            server.stop()


def test_only_the_missing_part_travels(servers: tuple[Server, Server]) -> None:
    """A prompt that continues an earlier one is fetched from its first new block on, and its tokens are right."""
    producer, consumer = servers
    words = make_prompt(700, seed=1).split()
    fetched = []
    for length in (300, 700):
        prompt = " ".join(words[:length])
        # the producer is asked alone: the consumer would remember its own answer
        alone = producer.text(prompt)
        before = _fetched(consumer)
        assert hand_over(producer, consumer, prompt) == alone
        deadline_s = time.monotonic() + 10
        while (now := _fetched(consumer)) == before and time.monotonic() < deadline_s:
            time.sleep(0.1)
        fetched.append(now - before)
    # [4 layers, 2 heads, 64] of float32, keys and values; two blocks of 128 were there the second time
    token_bytes = 2 * 4 * 2 * 64 * 4
    assert fetched == [300 * token_bytes, (700 - 256) * token_bytes]


def test_prompt_that_is_here_is_released_there(servers: tuple[Server, Server]) -> None:
    """A prompt whose KV the consumer holds whole is not sent, and the producer does not wait for its lease to end."""
    producer, consumer = servers
    # two whole blocks and one token: all but that token can be here
    prompt = make_prompt(256, seed=2)
    alone = producer.text(prompt)
    assert hand_over(producer, consumer, prompt) == alone
    assert hand_over(producer, consumer, prompt) == alone
    deadline_s = time.monotonic() + 10
    while producer.count("vllm:kvserve_leases_ended_total") < 4 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    ended = producer.metrics("vllm:kvserve_leases_ended_total")
    assert sum(ended.values()) == 4
    assert not any("Expired" in labels for labels in ended)


def test_other_connector_saves_what_it_is_there_for(servers: tuple[Server, Server]) -> None:
    """Under MultiConnector both connectors do their work: what was prefilled here lies in the other's storage, too."""
    producer, consumer = servers
    prompt = make_prompt(300, seed=3)
    alone = producer.text(prompt)
    assert hand_over(producer, consumer, prompt) == alone
    for server, role in zip(servers, ("kv_producer", "kv_consumer"), strict=True):
        saved = list((server.log.parent / role).glob("*/*.safetensors"))
        # a file for each of 4 layers
        assert saved, role
        assert len(saved) % 4 == 0
    # neither takes the other's work for its own
    assert not producer.metrics("vllm:kvserve_transfer_failures_total")
    assert not consumer.metrics("vllm:kvserve_transfer_failures_total")


def _example(storage: Path) -> dict[str, Any]:
    """Return the config of a connector of vLLM's own that runs on CPUs: it keeps prompts in files."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(storage)},
    }


def _fetched(consumer: Server) -> float:
    return consumer.count("vllm:kvserve_native_bytes_total", 'direction="receive"')
