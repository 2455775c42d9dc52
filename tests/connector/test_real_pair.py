"""Two real vLLM servers, one prefilling for the other: what arrives is right, and what is not right is recomputed."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostile_proxy import HostileProxy
from kvserve_api.telemetry import (
    LEASES,
    SPAN_DECODE,
    SPAN_ENCODE,
    SPAN_PREFILL,
    SPAN_TRANSFER,
    SPAN_WIRE,
    TABLE_AGE,
    TRANSFER_NATIVE_BYTES,
    TRANSFER_STAGE_DURATION,
    TRANSFER_WIRE_BYTES,
    Instrument,
)
from real_pair import LEASE_S, TIMEOUT_S, RealPair
from vllm_servers import Plan, at_once, free_port, hand_over, make_prompt, post, prefill, start

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]

LENGTHS = (1, 2, 127, 128, 129, 300, 1000)
LAST_S = 20.0


def soon(holds: Callable[[], object], timeout_s: float = LAST_S) -> bool:
    """Wait until a call returns something true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := holds()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return bool(found)


@pytest.mark.parametrize("profile", ["none", "lossless"])
def test_lossless_tokens_equal_a_single_servers(real_pair: RealPair, profile: str) -> None:
    """With a lossless profile the pair's tokens are those of one server, for prompts around a block's size."""
    real_pair.use(profile)
    fetched, sent = real_pair.fetched_tokens(), real_pair.sent(profile)
    for length in LENGTHS:
        prompt = make_prompt(length, seed=length)
        alone = real_pair.consumer.text(prompt)
        assert hand_over(real_pair.producer, real_pair.consumer, prompt) == alone, length
    # the KV did travel: vLLM computes only the last token of each prompt itself
    assert soon(lambda: real_pair.sent(profile) == sent + len(LENGTHS))
    assert soon(lambda: real_pair.fetched_tokens() - fetched >= sum(LENGTHS) - len(LENGTHS))


def test_requests_side_by_side(real_pair: RealPair) -> None:
    """Eight transfers at once do not mix up their tokens."""
    real_pair.use("lossless")
    prompts = [make_prompt(200 + 30 * index, seed=40 + index) for index in range(8)]
    alone = [real_pair.consumer.text(prompt) for prompt in prompts]
    sent = real_pair.sent("lossless")
    with ThreadPoolExecutor(8) as pool:
        handed = pool.map(lambda p: hand_over(real_pair.producer, real_pair.consumer, p), prompts)
        assert list(handed) == alone
    assert soon(lambda: real_pair.sent("lossless") == sent + len(prompts))


def test_lossy_profile_is_used_and_saves_bytes(real_pair: RealPair) -> None:
    """A pinned lossy profile is what is sent, at the ratio it promises."""
    real_pair.use("int4-token")
    before = {
        name: real_pair.consumer.count(f"vllm:kvserve_{name}_total", 'profile="int4-token"')
        for name in ("native_bytes", "wire_bytes")
    }
    hand_over(real_pair.producer, real_pair.consumer, make_prompt(1000, seed=3))
    assert soon(
        lambda: (
            real_pair.consumer.count("vllm:kvserve_native_bytes_total", 'profile="int4-token"')
            > before["native_bytes"]
        )
    )
    native, wire = (
        real_pair.consumer.count(f"vllm:kvserve_{name}_total", 'profile="int4-token"')
        - before[name]
        for name in ("native_bytes", "wire_bytes")
    )
    # [4 layers, 1000 tokens, 2 heads, 64] of float32, keys and values
    assert native == 2 * 4 * 1000 * 2 * 64 * 4
    assert native / wire > 6


def test_calibrated_profile_is_fetched_and_used(real_pair: RealPair) -> None:
    """Both servers fetch the bundle that a table names, what is sent is smaller, and the text begins the same."""
    real_pair.use("joint", timeout_s=60)
    sent, fetched = real_pair.sent("joint"), real_pair.fetched_tokens()
    marks = ('direction="receive"', 'profile="joint"')
    before = [
        real_pair.consumer.count(f"vllm:kvserve_{name}_total", *marks)
        for name in ("native_bytes", "wire_bytes")
    ]
    # none whose two likeliest next words are nearly as likely: there any loss may turn them round
    lengths = (1, 4, 5, 290, 1000)
    for length in lengths:
        prompt = make_prompt(length, seed=60 + length)
        alone = real_pair.consumer.text(prompt).split()
        handed = hand_over(real_pair.producer, real_pair.consumer, prompt).split()
        # for the least difference a random model soon goes another way; for another cache it does at once
        assert handed[0] == alone[0], length
    assert soon(lambda: real_pair.sent("joint") == sent + len(lengths))
    assert soon(lambda: real_pair.fetched_tokens() - fetched >= sum(lengths) - len(lengths))
    native, wire = (
        real_pair.consumer.count(f"vllm:kvserve_{name}_total", *marks) - count
        for name, count in zip(("native_bytes", "wire_bytes"), before, strict=True)
    )
    assert native == 2 * 4 * sum(lengths) * 2 * 64 * 4
    assert native / wire > 2


def test_active_mode_chooses_by_the_link(real_pair: RealPair) -> None:
    """Without a pin, a fast link and slow codecs lead to raw; the choice is the law's, not the pin's."""
    real_pair.controller.set_policy(quality={"maxLossBasisPoints": 1})
    status = real_pair.controller.status
    real_pair.controller.wait(
        lambda: (
            status()["default/chat"]["conditions"][0]["observedGeneration"]
            == real_pair.controller.generation
            and all(t["synced"] == 1 for t in status()["default/chat"]["targets"])
            and status()["default/chat"]["activeProfile"]["name"] in ("none", "lossless")
        )
    )
    sent, lossy = real_pair.sent(), real_pair.sent("int4-token")
    hand_over(real_pair.producer, real_pair.consumer, make_prompt(500, seed=4))
    # until it is counted: the next test may count the profile that this one chose
    assert soon(lambda: real_pair.sent() == sent + 1)
    assert real_pair.sent("int4-token") == lossy


@pytest.mark.parametrize("head_start_s", [0.0, 0.3], ids=["together", "decode-first"])
def test_prefill_and_decode_at_once(real_pair: RealPair, head_start_s: float) -> None:
    """Requests that both servers get at the same time have a single server's tokens, and their KV travels."""
    real_pair.use("lossless")
    where = real_pair.transfers_at()
    sent, fetched = real_pair.sent("lossless"), real_pair.fetched_tokens()
    for length in LENGTHS:
        prompt = make_prompt(length, seed=300 + length)
        alone = real_pair.consumer.text(prompt)
        text = at_once(
            real_pair.producer, real_pair.consumer, prompt, where, head_start_s=head_start_s
        )
        assert text == alone, length
    assert soon(lambda: real_pair.sent("lossless") == sent + len(LENGTHS))
    assert soon(lambda: real_pair.fetched_tokens() - fetched >= sum(LENGTHS) - len(LENGTHS))
    assert soon(lambda: real_pair.producer.count("vllm:kv_cache_usage_perc") == 0)


def test_many_at_once(real_pair: RealPair) -> None:
    """Eight prefills that share the engine's steps, each with its decode request beside it, do not mix up their KV."""
    real_pair.use("lossless")
    where = real_pair.transfers_at()
    prompts = [make_prompt(150 + 130 * index, seed=340 + index) for index in range(8)]
    alone = [real_pair.consumer.text(prompt) for prompt in prompts]
    failed = sum(real_pair.consumer.metrics("vllm:kvserve_transfer_failures_total").values())
    sent = real_pair.sent("lossless")
    with ThreadPoolExecutor(8) as pool:
        handed = pool.map(
            lambda p: at_once(real_pair.producer, real_pair.consumer, p, where), prompts
        )
        assert list(handed) == alone
    assert soon(lambda: real_pair.sent("lossless") == sent + len(prompts))
    now = sum(real_pair.consumer.metrics("vllm:kvserve_transfer_failures_total").values())
    assert now == failed


@pytest.mark.parametrize("connector", ["nixl", "mooncake"])
def test_behind_the_real_router(real_pair: RealPair, tmp_path: Path, connector: str) -> None:
    """An unmodified vllm-router drives the pair, one request after the other or both at once."""
    real_pair.use("lossless")
    port = free_port()
    sent = real_pair.sent("lossless")
    bootstrap = [str(real_pair.bootstrap_port)] if connector == "mooncake" else []
    with (tmp_path / "router.log").open("wb") as log:
        router = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "vllm-router"), "--vllm-pd-disaggregation",
                "--prefill", f"http://127.0.0.1:{real_pair.producer.port}", *bootstrap,
                "--decode", f"http://127.0.0.1:{real_pair.consumer.port}",
                "--host", "127.0.0.1", "--port", str(port), "--kv-connector", connector,
                "--policy", "round_robin", "--prometheus-port", str(free_port()),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        prompt = make_prompt(333, seed=9)
        alone = real_pair.consumer.text(prompt)
        assert soon(lambda: _listens(port))
        body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0.0}
        assert soon(lambda: _answer(port, body) == alone)
        assert soon(lambda: real_pair.sent("lossless") > sent)
    finally:
        router.terminate()
        router.wait(10)


def test_corrupted_payload_is_recomputed(real_pair: RealPair) -> None:
    """A flipped byte inside a chunk is found, counted, and the request is computed instead."""
    real_pair.use("none")
    prompt = make_prompt(400, seed=21)
    alone = real_pair.consumer.text(prompt)
    before = real_pair.failures("ChecksumMismatch")
    params = prefill(real_pair.producer, prompt)
    with HostileProxy(params["remote_port"], flip_at=200_000) as proxy:
        text = real_pair.consumer.text(
            prompt, kv_transfer_params=params | {"remote_port": proxy.port}
        )
    assert text == alone
    assert soon(lambda: real_pair.failures("ChecksumMismatch") == before + 1)


@pytest.mark.parametrize(
    ("harm", "reason", "most_s"),
    [
        pytest.param({"cut_at": 100_000}, "PeerLost", 4.0, id="cut"),
        pytest.param({"freeze_at": 100_000}, "Timeout", 8.0, id="frozen"),
        pytest.param({"bytes_per_s": 30_000.0}, "Timeout", TIMEOUT_S + 4, id="too-slow"),
    ],
)
def test_broken_link_is_recomputed(
    real_pair: RealPair, harm: dict[str, float], reason: str, most_s: float
) -> None:
    """A link that breaks, freezes or crawls costs bounded time, and the tokens are right."""
    real_pair.use("none")
    prompt = make_prompt(300, seed=31)
    alone = real_pair.consumer.text(prompt)
    before = real_pair.failures(reason)
    params = prefill(real_pair.producer, prompt)
    started_s = time.monotonic()
    with HostileProxy(params["remote_port"], **harm) as proxy:  # type: ignore[arg-type]
        text = real_pair.consumer.text(
            prompt, kv_transfer_params=params | {"remote_port": proxy.port}
        )
    assert text == alone
    assert time.monotonic() - started_s < most_s
    assert soon(lambda: real_pair.failures(reason) == before + 1)


def test_another_prompts_kv_is_refused(real_pair: RealPair) -> None:
    """A router that mixes up two prompts of one length does not lead to the other one's KV."""
    first, second = make_prompt(150, seed=51), make_prompt(150, seed=52)
    alone = real_pair.consumer.text(second)
    before = real_pair.failures("PeerRefused")
    params = prefill(real_pair.producer, first)
    assert real_pair.consumer.text(second, kv_transfer_params=params) == alone
    assert soon(lambda: real_pair.failures("PeerRefused") == before + 1)


def test_foreign_parameters_are_computed_here(real_pair: RealPair) -> None:
    """Parameters that are not a KVServe prefill's leave the request to the consumer itself."""
    prompt = make_prompt(60, seed=61)
    alone = real_pair.consumer.text(prompt)
    for params in (
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "kvserve_protocol": 1, "remote_host": 7},
    ):
        assert real_pair.consumer.text(prompt, kv_transfer_params=params) == alone


def test_unused_prefill_is_freed(real_pair: RealPair) -> None:
    """A prefill that nobody fetches gives its blocks back when its lease ends."""
    before = real_pair.leases("Expired")
    prefill(real_pair.producer, make_prompt(200, seed=71))
    assert soon(lambda: real_pair.leases("Expired") == before + 1, LEASE_S + 5)
    assert soon(lambda: real_pair.producer.count("vllm:kv_cache_usage_perc") == 0)


def test_aborted_request_frees_both_sides(real_pair: RealPair) -> None:
    """A client that hangs up during a transfer leaves no blocks behind on either side."""
    real_pair.use("none")
    before = real_pair.failures("Cancelled")
    prompt = make_prompt(300, seed=81)
    params = prefill(real_pair.producer, prompt)
    with HostileProxy(params["remote_port"], bytes_per_s=50_000.0) as proxy:
        pool = ThreadPoolExecutor(1)
        impatient = pool.submit(
            post,
            real_pair.consumer.port,
            "/v1/completions",
            {
                "model": "m",
                "prompt": prompt,
                "max_tokens": 8,
                "kv_transfer_params": params | {"remote_port": proxy.port},
            },
            timeout_s=1.5,
        )
        assert isinstance(impatient.exception(10), TimeoutError)
        pool.shutdown()
        assert soon(lambda: real_pair.failures("Cancelled") == before + 1)
    assert soon(lambda: real_pair.producer.count("vllm:kv_cache_usage_perc") == 0)
    assert soon(lambda: real_pair.consumer.count("vllm:kv_cache_usage_perc") == 0)


def test_one_trace_from_prefill_to_decode(real_pair: RealPair) -> None:
    """The spans of both pods form one trace whose root is the prefill."""
    hand_over(real_pair.producer, real_pair.consumer, make_prompt(140, seed=91))
    names = {SPAN_PREFILL, SPAN_TRANSFER, SPAN_ENCODE, SPAN_WIRE, SPAN_DECODE}

    def trace_of_last_prefill() -> dict[str, str] | None:
        roots = [s for s in real_pair.receiver.spans if s.name == SPAN_PREFILL]
        last = max(roots, key=lambda s: s.start_ns, default=None)
        if last is None or last.attributes.get("kvserve.tokens") != 140:
            return None
        spans = {s.name: s for s in real_pair.receiver.spans if s.trace_id == last.trace_id}
        if set(spans) != names:
            return None
        assert spans[SPAN_PREFILL].parent_id == ""
        assert spans[SPAN_TRANSFER].parent_id == spans[SPAN_PREFILL].span_id
        below = {spans[n].parent_id for n in (SPAN_ENCODE, SPAN_WIRE, SPAN_DECODE)}
        assert below == {spans[SPAN_TRANSFER].span_id}
        return {name: span.service for name, span in spans.items()}

    assert soon(trace_of_last_prefill)
    services = trace_of_last_prefill()
    assert services is not None
    assert services[SPAN_ENCODE] == "kvserve-kv_producer"
    assert services[SPAN_DECODE] == "kvserve-kv_consumer"


def test_metrics_over_otlp(real_pair: RealPair) -> None:
    """Both pods send the metrics of a transfer, with the units and marks that the constants promise."""
    real_pair.use("int8-token")
    hand_over(real_pair.producer, real_pair.consumer, make_prompt(150, seed=95))

    def seen(instrument: Instrument, **marks: str) -> Callable[[], bool]:
        wanted = {key.replace("_", "."): value for key, value in marks.items()}
        return lambda: any(
            point.unit == instrument.unit and wanted.items() <= point.attributes.items()
            for point in list(real_pair.receiver.points)
            if point.name == instrument.name and point.value > 0
        )

    for direction in ("send", "receive"):
        marks = {"kvserve_direction": direction, "kvserve_profile": "int8-token"}
        assert soon(seen(TRANSFER_NATIVE_BYTES, **marks))
        assert soon(seen(TRANSFER_WIRE_BYTES, **marks))
    for stage in ("encode", "wire", "decode", "total"):
        assert soon(seen(TRANSFER_STAGE_DURATION, kvserve_stage=stage))
    assert soon(seen(LEASES, kvserve_reason="Sent"))
    assert soon(seen(TABLE_AGE))


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_controller_failure_loses_no_request(real_pair: RealPair, how: str) -> None:
    """With the controller frozen or killed in the middle, all requests go on by the last table."""
    real_pair.use("lossless")
    prompts = [make_prompt(160 + index, seed=100 + index) for index in range(10)]
    alone = [real_pair.consumer.text(prompt, 6) for prompt in prompts]
    sent = real_pair.sent("lossless")
    try:
        with ThreadPoolExecutor(2) as pool:
            futures = []
            for index, prompt in enumerate(prompts):
                if index == 4:
                    if how == "killed":
                        real_pair.controller.kill()
                    else:
                        real_pair.controller.signal(signal.SIGSTOP)
                futures.append(
                    pool.submit(hand_over, real_pair.producer, real_pair.consumer, prompt, 6)
                )
                time.sleep(0.1)
            assert [future.result(30) for future in futures] == alone
        assert soon(lambda: real_pair.sent("lossless") == sent + len(prompts))
    finally:
        if how == "killed":
            real_pair.controller.start()
        else:
            real_pair.controller.signal(signal.SIGCONT)
    # and afterwards the pods find their way back to it
    real_pair.use("none", timeout_s=40)


def test_killed_producer_is_recomputed(real_pair: RealPair) -> None:
    """A producer that dies in the middle of a transfer costs bounded time, and the tokens are right."""
    producer = start(
        # a third server: bound to a core with another it was seen to stand still for ten seconds, both of them
        Plan(role="kv_producer", core=None, extra={"chunk_layers": 1}),
        real_pair.model,
        real_pair.folder,
    )
    try:
        producer.wait_ready()
        # its first transfer may be slow while the engine warms up beside it; the one that is cut must be under way
        first = make_prompt(200, seed=199)
        params = prefill(producer, first)
        assert real_pair.consumer.text(first, kv_transfer_params=params) == real_pair.consumer.text(
            first
        )
        # more than sockets can hold: the kernel delivers what a dead process has written
        prompt = make_prompt(1600, seed=200)
        alone = real_pair.consumer.text(prompt)
        before = real_pair.failures("PeerLost")
        params = prefill(producer, prompt)
        with (
            HostileProxy(params["remote_port"], bytes_per_s=2e6) as proxy,
            ThreadPoolExecutor(1) as pool,
        ):
            future = pool.submit(
                real_pair.consumer.text,
                prompt,
                kv_transfer_params=params | {"remote_port": proxy.port},
            )
            proxy.wait_forwarded(500_000)
            producer.signal(signal.SIGKILL)
            started_s = time.monotonic()
            assert future.result(30) == alone
            assert time.monotonic() - started_s < TIMEOUT_S
        assert soon(lambda: real_pair.failures("PeerLost") == before + 1)
    finally:
        producer.stop()


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _answer(port: int, body: dict[str, object]) -> str | None:
    """Return the router's answer; None while it has not yet found its workers."""
    try:
        text: str = post(port, "/v1/completions", body)["choices"][0]["text"]
    except (AssertionError, OSError):
        return None
    return text
