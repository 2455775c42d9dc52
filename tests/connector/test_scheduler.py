"""What the scheduler half decides for real vLLM requests, without an engine."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kv_loopback import BLOCK, ENGINE
from kvserve_connector.groups import Group, Opaque, Reach
from kvserve_connector.handover import prompt_digest

pytestmark = pytest.mark.slow  # importing vLLM takes its time


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Import vLLM, whose own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.request  # noqa: F401


def make_request(tokens: int = 37, request_id: str = "r1", **params: Any) -> Any:
    """Return a real request with these ``kv_transfer_params``."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    extra = {"kv_transfer_params": params, "kvserve_workload": "chat"}
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=1, extra_args=extra),
        pooling_params=None,
        arrival_time=100.0,
    )


def make_half(**roles: Any) -> Any:
    """Return a scheduler half that knows its worker's address, two seconds after the requests' arrival."""
    from kvserve_connector.metadata import ServerAddress
    from kvserve_connector.scheduler import SchedulerHalf

    roles = roles or {"is_producer": True, "is_consumer": True}
    half = SchedulerHalf(ENGINE, now_s=lambda: 102.0, **roles)
    half.set_addresses([ServerAddress(host="10.0.0.7", port=7790)])
    return half


def finish(request: Any, computed: int, status: str = "FINISHED_LENGTH_CAPPED") -> Any:
    """Let a request end in a state."""
    from vllm.v1.request import RequestStatus

    request.num_computed_tokens = computed
    request.status = RequestStatus[status]
    return request


def blocks(*ids: int) -> Any:
    """Return what vLLM allocated, as far as the connector looks at it."""
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


def offer(tokens: int = 37, **changes: Any) -> dict[str, Any]:
    """Return what a producer's answer says, through a real producer half."""
    half = make_half(is_producer=True, is_consumer=False)
    request = finish(make_request(tokens, "remote", do_remote_decode=True), tokens)
    kept, params = half.finished(request, (list(range(1, 12)),))
    assert kept
    return dict(params) | changes


def test_finished_prefill_is_kept_and_offered() -> None:
    """A prefill that ended well is kept with its prompt's blocks, and the answer says where."""
    half = make_half(is_producer=True, is_consumer=False)
    request = finish(make_request(37, do_remote_decode=True, do_remote_prefill=False), 37)
    kept, params = half.finished(request, ([5, 6, 7, 8],))
    assert kept
    assert params["do_remote_prefill"] is True
    assert (params["remote_host"], params["remote_port"]) == ("10.0.0.7", 7790)
    assert params["remote_num_tokens"] == 37
    (lease,) = half.take_step().leases
    # 37 tokens are in three blocks of 16; the fourth holds none of them
    assert lease.block_ids == ((5, 6, 7),)
    assert (lease.tokens, lease.workload, lease.model_s) == (37, "chat", 2.0)
    assert lease.prompt_digest == prompt_digest(range(37))
    assert half.take_step().leases == []


@pytest.mark.parametrize(
    ("status", "params"),
    [
        pytest.param("FINISHED_ABORTED", {"do_remote_decode": True}, id="aborted"),
        pytest.param("FINISHED_LENGTH_CAPPED", {}, id="not-asked-for"),
        pytest.param("FINISHED_LENGTH_CAPPED", {"do_remote_decode": "yes"}, id="odd"),
    ],
)
def test_other_requests_are_not_kept(status: str, params: dict[str, Any]) -> None:
    """An aborted prefill, or a request that is none, frees its blocks at once."""
    half = make_half()
    request = finish(make_request(37, **params), 37, status)
    assert half.finished(request, ([5, 6, 7],)) == (False, None)
    assert half.take_step().leases == []


@pytest.mark.parametrize("computed", [0, BLOCK])
def test_offered_kv_is_fetched_once(computed: int) -> None:
    """What is not here already is fetched, into the request's blocks, and only once."""
    half = make_half()
    request = make_request(37, **offer())
    assert half.matched_tokens(request, computed) == (37 - computed, True)
    assert half.matched_tokens(request, computed) == (37 - computed, True)
    half.allocated(request, blocks(3, 4, 9), 37 - computed)
    (load,) = half.take_step().loads
    assert load.tokens == range(computed, 37)
    assert load.block_ids == ((3, 4, 9),)
    assert load.remote.request_id == "remote"
    assert load.prompt_digest == prompt_digest(range(37))
    half.allocated(request, blocks(3, 4, 9), 0)
    assert half.matched_tokens(request, 0) == (0, False)
    step = half.take_step()
    assert (step.loads, step.releases) == ([], [])


def test_what_is_here_already_is_released_there() -> None:
    """A prompt that the local cache holds whole is not fetched, and its producer is told."""
    half = make_half()
    request = make_request(32, **offer(32))
    assert half.matched_tokens(request, 32) == (0, False)
    half.allocated(request, blocks(3, 4), 0)
    step = half.take_step()
    assert step.loads == []
    assert [remote.request_id for remote in step.releases] == ["remote"]


def test_rejected_request_is_released_there() -> None:
    """A stand-in that vLLM finishes for a rejected request, with another prompt, releases the prefill too."""
    half = make_half()
    stand_in = finish(make_request(1, **offer(37)), 0, "FINISHED_ABORTED")
    assert half.finished(stand_in, ([],)) == (False, None)
    assert [remote.tokens for remote in half.take_step().releases] == [37]


def test_abort_during_the_fetch_cancels_it() -> None:
    """A request that is aborted while its KV arrives has its fetch cancelled; afterwards there is nothing to cancel."""
    half = make_half()
    for request_id, received in (("a", False), ("b", True)):
        request = make_request(37, request_id, **offer())
        half.matched_tokens(request, 0)
        half.allocated(request, blocks(1, 2, 3), 37)
        if received:
            half.received({request_id})
        half.finished(finish(request, 37, "FINISHED_ABORTED"), ([1, 2, 3],))
    assert half.take_step().cancelled == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"remote_num_tokens": 36}, id="another-length"),
        pytest.param({"remote_port": 0}, id="bad-port"),
        pytest.param({"remote_host": None}, id="no-host"),
        pytest.param({"kvserve_protocol": 2}, id="another-protocol"),
        pytest.param({"kvserve_protocol": None}, id="another-connector"),
    ],
)
def test_unusable_offers_are_computed_here(change: dict[str, Any]) -> None:
    """An offer that can't be this request's KV offers no tokens."""
    half = make_half()
    request = make_request(37, **offer(**change))
    assert half.matched_tokens(request, 0) == (0, False)
    half.allocated(request, blocks(1, 2, 3), 0)
    assert half.take_step().loads == []


def test_odd_workload_is_the_default() -> None:
    """A workload class that can't be one counts as the default."""
    half = make_half()
    request = finish(make_request(8, do_remote_decode=True), 8)
    request.sampling_params.extra_args["kvserve_workload"] = "../etc"
    half.finished(request, ([1],))
    assert half.take_step().leases[0].workload == "default"


HYBRID = replace(
    ENGINE,
    layout=None,
    opaque=Opaque.STATE,
    groups=(
        Group(index=0, layer_names=("a",), block_tokens=16),
        Group(index=2, layer_names=("b",), block_tokens=16, reach=Reach.WINDOW, span=20),
        Group(index=1, layer_names=("c",), block_tokens=1024, reach=Reach.STATE, spare_blocks=1),
    ),
)


def make_hybrid() -> Any:
    """Return a scheduler half of a model that forgets."""
    from kvserve_connector.metadata import ServerAddress
    from kvserve_connector.scheduler import SchedulerHalf

    half = SchedulerHalf(HYBRID, is_producer=True, is_consumer=True, now_s=lambda: 102.0)
    half.set_addresses([ServerAddress(host="10.0.0.7", port=7790)])
    return half


def test_a_token_is_held_back_where_layers_forget() -> None:
    """A prefill for a consumer stops one token short, once; a prompt of one token, or one of our own, is whole."""
    half = make_hybrid()
    request = make_request(37, do_remote_decode=True)
    for _ in range(2):
        half.arrived(request)
        assert request.num_prompt_tokens == 36
        assert len(request.prompt_token_ids) == request.num_tokens == 36
    for tokens, remote_decode in ((1, True), (37, False)):
        whole = make_request(tokens, do_remote_decode=remote_decode)
        half.arrived(whole)
        assert whole.num_prompt_tokens == tokens
    plain = make_request(37, do_remote_decode=True)
    make_half().arrived(plain)
    assert plain.num_prompt_tokens == 37


def test_groups_hand_over_their_own_blocks() -> None:
    """Each group's own blocks are kept and filled, and the prompt is the one without its last token."""
    half = make_hybrid()
    request = make_request(37, "remote", do_remote_decode=True)
    half.arrived(request)
    lists = ([5, 6, 7, 8], [21, 22], [0, 12, 13, 14])
    kept, params = half.finished(finish(request, 36), lists)
    assert kept
    assert params["remote_num_tokens"] == 36
    (lease,) = half.take_step().leases
    # in the order of the groups; of the recurrent one the last block is kept for speculation
    assert lease.block_ids == ((5, 6, 7), (0, 12, 13), (21,))
    assert lease.prompt_digest == prompt_digest(range(36))

    wanted = make_request(37, **params)
    assert half.matched_tokens(wanted, 0) == (36, True)
    ids = SimpleNamespace(get_block_ids=lambda: ([1, 2, 3], [9, 10], [0, 4, 11]))
    half.allocated(wanted, ids, 36)
    (load,) = half.take_step().loads
    assert load.block_ids == ((1, 2, 3), (0, 4, 11), (9,))
    assert (load.tokens, load.prompt_digest) == (range(36), lease.prompt_digest)


def test_a_prompt_of_one_token_is_not_fetched() -> None:
    """Where a token is held back, the prefill of a single one is of no use, and is released."""
    half = make_hybrid()
    remote = make_request(1, "remote", do_remote_decode=True)
    half.arrived(remote)
    kept, params = half.finished(finish(remote, 1), ([5], [21, 22], [12]))
    assert kept
    half.take_step()
    wanted = make_request(1, **params)
    assert half.matched_tokens(wanted, 0) == (0, False)
    half.allocated(wanted, blocks(1), 0)
    assert [r.request_id for r in half.take_step().releases] == ["remote"]


def test_a_worker_that_can_not_serve_is_counted() -> None:
    """A prefill for a consumer, in an engine whose cache can't be carried, frees its blocks and is counted."""
    from kvserve_connector.scheduler import SchedulerHalf

    half = SchedulerHalf(ENGINE, is_producer=True, is_consumer=False)
    request = finish(make_request(37, do_remote_decode=True), 37)
    assert half.finished(request, ([5, 6, 7],)) == (False, None)
    assert half.take_step().unserved == 1
    assert half.take_step().unserved == 0


def step(
    half: Any,
    counts: dict[str, int],
    block_ids: dict[str, list[int]] | None = None,
    preempted: tuple[str, ...] = (),
) -> Any:
    """Let a step be scheduled and return the news of it."""
    half.scheduled(
        SimpleNamespace(
            num_scheduled_tokens=counts,
            preempted_req_ids=set(preempted),
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda name: ((block_ids or {}).get(name, [5, 6, 7]),)
            ),
        )
    )
    return half.take_step()


def test_running_prefill_is_announced_and_followed() -> None:
    """A prefill for a consumer is named when it arrives, followed as it is computed, and never beyond its prompt."""
    half = make_half()
    request = make_request(37, do_remote_decode=True, transfer_id="xfer-1")
    half.arrived(request)
    (prefill,) = half.take_step().prefills
    assert (prefill.request_id, prefill.transfer_id, prefill.tokens) == ("r1", "xfer-1", 37)
    assert (prefill.prompt_digest, prefill.workload) == (prompt_digest(range(37)), "chat")
    (progress,) = step(half, {"r1": 20, "other": 5}, {"r1": [5, 6]}).progress
    assert (progress.tokens, progress.block_ids) == (20, ((5, 6),))
    request.num_computed_tokens = 20
    (progress,) = step(half, {"r1": 17}).progress
    assert (progress.tokens, progress.block_ids) == (37, ((5, 6, 7),))
    request.num_computed_tokens = 37
    assert step(half, {"r1": 1}).progress == []
    half.finished(finish(request, 37), ([5, 6, 7],))
    news = half.take_step()
    assert (len(news.leases), news.stopped) == (1, [])


def test_cached_tokens_count_after_the_step() -> None:
    """Tokens that the prefix cache holds are told with the first step: a neighbour may write them in the same one."""
    half = make_half()
    request = make_request(37, do_remote_decode=True)
    half.arrived(request)
    assert half.take_step().progress == []
    request.num_computed_tokens = 32
    (progress,) = step(half, {"r1": 5}).progress
    assert progress.tokens == 37


def test_preempted_prefill_begins_anew() -> None:
    """Blocks that were taken away are let go in the same step, whether vLLM says so or merely computes again."""
    for told in (True, False):
        half = make_half()
        request = make_request(37, do_remote_decode=True)
        half.arrived(request)
        step(half, {"r1": 20})
        request.num_computed_tokens = 0
        if told:
            assert step(half, {}, preempted=("r1",)).preempted == ["r1"]
        news = step(half, {"r1": 16}, {"r1": [9]})
        assert news.preempted == ([] if told else ["r1"])
        (progress,) = news.progress
        assert (progress.tokens, progress.block_ids) == (16, ((9,),))


def test_blocks_that_moved_are_let_go() -> None:
    """Where a request's blocks are others without a word of a preemption, the old ones are not read any more."""
    half = make_half()
    request = make_request(37, do_remote_decode=True)
    half.arrived(request)
    step(half, {"r1": 20}, {"r1": [5, 6]})
    request.num_computed_tokens = 20
    news = step(half, {"r1": 17}, {"r1": [5, 9, 7]})
    assert news.preempted == ["r1"]
    assert [progress.tokens for progress in news.progress] == [37]


@pytest.mark.parametrize("computed", [0, 20])
def test_aborted_prefill_is_stopped(computed: int) -> None:
    """A prefill that is aborted before or while it is computed is told as ended."""
    half = make_half()
    request = make_request(37, do_remote_decode=True, transfer_id="x")
    half.arrived(request)
    if computed:
        step(half, {"r1": computed})
    half.finished(finish(request, computed, "FINISHED_ABORTED"), ([5, 6],))
    assert half.take_step().stopped == ["r1"]
    assert step(half, {"r1": 1}).progress == []


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"remote_host": "10.0.0.7", "remote_port": 7790}, id="address"),
        pytest.param(
            {
                "remote_engine_id": "e-1@10.0.0.7:7790",
                "remote_bootstrap_addr": "http://10.0.0.7:8998",
            },
            id="bootstrap",
        ),
    ],
)
def test_decode_request_may_come_with_its_prefill(where: dict[str, Any]) -> None:
    """A request that names a transfer is fetched under that name, whole, and renewed and released under it too."""
    half = make_half()
    request = make_request(37, do_remote_prefill=True, transfer_id="xfer-1", **where)
    half.arrived(request)
    (wanted,) = half.take_step().wanted
    assert (wanted.host, wanted.port, wanted.request_id) == ("10.0.0.7", 7790, "xfer-1")
    assert wanted.transfer
    assert half.matched_tokens(request, BLOCK) == (37 - BLOCK, True)
    half.allocated(request, blocks(3, 4, 9), 37 - BLOCK)
    (load,) = half.take_step().loads
    assert (load.remote, load.tokens) == (wanted, range(BLOCK, 37))


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"remote_engine_id": "e-1", "remote_bootstrap_addr": "h:1"}, id="not-ours"),
        pytest.param({"remote_engine_id": "e-1@10.0.0.7:0"}, id="no-port"),
        pytest.param({"remote_host": "10.0.0.7"}, id="host-only"),
        pytest.param({}, id="nowhere"),
    ],
)
def test_transfers_of_others_are_computed_here(where: dict[str, Any]) -> None:
    """A transfer whose producer is not named as one of ours offers no tokens."""
    half = make_half()
    request = make_request(37, do_remote_prefill=True, transfer_id="xfer-1", **where)
    half.arrived(request)
    assert half.matched_tokens(request, 0) == (0, False)
    assert half.take_step().wanted == []


def make_ranks(ranks: int) -> Any:
    """Return a scheduler half of an engine with so many tensor-parallel workers."""
    from kvserve_connector.metadata import ServerAddress
    from kvserve_connector.scheduler import SchedulerHalf

    half = SchedulerHalf(replace(ENGINE, ranks=ranks), is_producer=True, is_consumer=True)
    half.set_addresses([ServerAddress(host="10.0.0.7", port=7790 + rank) for rank in range(ranks)])
    return half


def test_workers_fetch_from_their_like() -> None:
    """The answer names every worker's port, and each worker of an engine of as many asks the one of its rank."""
    half = make_ranks(2)
    kept, params = half.finished(
        finish(make_request(37, "remote", do_remote_decode=True), 37), ([5, 6, 7],)
    )
    assert kept
    assert (params["tp_size"], params["remote_port"], params["kvserve_ports"]) == (
        2,
        7790,
        [7790, 7791],
    )
    request = make_request(37, **params)
    assert half.matched_tokens(request, 0) == (37, True)
    half.allocated(request, blocks(1, 2, 3), 37)
    (load,) = half.take_step().loads
    assert [load.remote.of_rank(rank).port for rank in (0, 1)] == [7790, 7791]


@pytest.mark.parametrize(("there", "here"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_workers_is_computed_here(
    there: int, here: int, caplog: pytest.LogCaptureFixture
) -> None:
    """KV that is cut otherwise is not fetched, the log says why, and the prefill is released."""
    _, params = make_ranks(there).finished(
        finish(make_request(37, "remote", do_remote_decode=True), 37), ([5, 6, 7],)
    )
    half = make_ranks(here)
    request = make_request(37, **params)
    assert half.matched_tokens(request, 0) == (0, False)
    assert f"tensor_parallel_size {there}, this engine {here}" in caplog.text
    half.allocated(request, blocks(1, 2, 3), 0)
    (remote,) = half.take_step().releases
    assert remote.ranks == there


def test_a_step_says_how_many_the_engine_has_to_compute() -> None:
    """Of three requests one waits for its KV, which is not computing, and one has ended: one is left."""
    half = make_half()
    waiting = make_request(request_id="waiting", **offer())
    for request in (make_request(request_id="ended"), make_request(request_id="runs"), waiting):
        half.arrived(request)
    half.allocated(waiting, blocks(1, 2, 3), 36)
    assert half.take_step().requests == 2
    half.finished(finish(make_request(request_id="ended"), 37), ([5, 6, 7],))
    assert half.take_step().requests == 1
    half.received({"waiting"})
    assert half.take_step().requests == 2


@pytest.mark.parametrize(("scheduled", "idle"), [({}, True), ({"r1": 5}, False)])
def test_a_step_says_whether_it_computes(scheduled: dict[str, int], idle: bool) -> None:
    """The worker half is told of a step without tokens, in which it may wait."""
    half = make_half()
    half.scheduled(SimpleNamespace(num_scheduled_tokens=scheduled, kv_connector_block_state=None))
    assert half.take_step().idle is idle
    assert half.take_step().idle is False
