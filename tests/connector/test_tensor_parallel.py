"""A real server with two tensor-parallel workers that hands over to itself: each worker fetches its own slice."""

import time
from collections.abc import Iterator

import pytest

from vllm_servers import Plan, Server, at_once, hand_over, make_model, make_prompt, prefill, start

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One engine that is producer and consumer, with a worker for each of the model's two heads."""
    folder = tmp_path_factory.mktemp("ranks")
    # three engine processes share the cores with whoever asks: that one may be late for a lease of half a minute
    plan = Plan(
        role="kv_both",
        core=None,
        extra={"lease_s": 300.0},
        arguments=("--tensor-parallel-size", "2"),
    )
    server = start(plan, make_model(folder / "model"), folder)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def test_each_worker_fetches_its_slice(server: Server) -> None:
    """Tokens are those without a hand-over, one after the other or both at once, and both slices travelled."""
    lengths = (1, 129, 400)
    for length in lengths:
        prompt = make_prompt(length, seed=length)
        alone = server.text(prompt)
        assert hand_over(server, server, prompt) == alone, length
        params = prefill(server, prompt)
        assert (params["tp_size"], len(params["kvserve_ports"])) == (2, 2)
        where = {"remote_host": params["remote_host"], "kvserve_ports": params["kvserve_ports"]}
        assert at_once(server, server, prompt, where) == alone, length
    deadline_s = time.monotonic() + 20
    native = ("vllm:kvserve_native_bytes_total", 'direction="receive"')
    # [4 layers, 2 heads, 64] of float32, keys and values, of both workers together
    wanted = 2 * sum(lengths) * 2 * 4 * 2 * 64 * 4
    while server.count(*native) < wanted and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert server.count(*native) == wanted
    assert server.metrics("vllm:kvserve_transfer_failures_total") == {}
