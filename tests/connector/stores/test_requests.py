"""The scheduler's side of a KV store, for real vLLM requests, without an engine."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from kvserve_connector.stores.config import StoreConfig
from kvserve_connector.stores.messages import StoreNews

pytestmark = pytest.mark.slow  # importing vLLM takes its time

CONFIG = StoreConfig(url="memory:///", lookup_s=1.0)


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Import vLLM, whose own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.request  # noqa: F401


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.s


def make_request(tokens: int, request_id: str = "r1", **facts: Any) -> Any:
    """Return a real request."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(tokens)),
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        **facts,
    )


def make_store(*, saves: bool = True, config: StoreConfig = CONFIG) -> tuple[Any, Clock]:
    """Return the scheduler's side, and its clock."""
    from kvserve_connector.prompts import stored_prompt
    from kvserve_connector.stores.requests import StoreRequests

    clock = Clock()
    return StoreRequests(config, saves=saves, prompt=stored_prompt, now_s=clock), clock


def run(store: Any, **tokens: int) -> Any:
    """Schedule a step with so many tokens of each request, and return what the worker is told of it."""
    state = SimpleNamespace(resolve_block_ids=lambda _: ([5, 6, 7],))
    store.scheduled(
        SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            kv_connector_block_state=state,
        )
    )
    return store.take_step()


def asked(tokens: int = 300, found: int = 256) -> tuple[Any, Any, Clock]:
    """Return a store, and a request of which it has found so much."""
    store, clock = make_store()
    request = make_request(tokens)
    store.arrived(request)
    assert store.matched_tokens(request, 0) is None
    store.heard(StoreNews(found={"r1": found}))
    return store, request, clock


def test_a_request_waits_for_its_answer_once() -> None:
    """The store is asked once; while it is, the scheduler is told to come again; then the answer holds."""
    store, clock = make_store()
    request = make_request(300)
    store.arrived(request)
    for _ in range(3):
        assert store.matched_tokens(request, 16) is None
    (lookup,) = store.take_step().lookups
    assert (lookup.prompt.request_id, lookup.computed, lookup.speed) == ("r1", 16, None)
    assert len(lookup.prompt.tokens) == 4 * 300
    clock.s += 0.9
    assert store.matched_tokens(request, 16) is None
    store.heard(StoreNews(found={"r1": 256}))
    assert store.matched_tokens(request, 16) == 240
    # meanwhile more of it has come into the prefix cache
    assert store.matched_tokens(request, 272) == 0
    assert store.take_step().lookups == []


def test_no_request_waits_for_long() -> None:
    """A question that is not answered in time is given up and counted, and a late answer changes nothing."""
    store, clock = make_store()
    request = make_request(300)
    store.arrived(request)
    assert store.matched_tokens(request, 0) is None
    clock.s += 1.1
    assert store.matched_tokens(request, 0) == 0
    assert store.take_step().late == 1
    store.heard(StoreNews(found={"r1": 256}))
    assert store.matched_tokens(request, 0) == 0


@pytest.mark.parametrize(
    ("tokens", "computed"),
    [pytest.param(40, 0, id="short"), pytest.param(300, 280, id="nearly-all-here")],
)
def test_little_is_not_asked_for(tokens: int, computed: int) -> None:
    """What is computed faster than any store answers is not looked for."""
    store, _ = make_store()
    request = make_request(tokens)
    store.arrived(request)
    assert store.matched_tokens(request, computed) == 0
    assert store.take_step().lookups == []


def test_when_the_prefix_cache_loses_what_it_had_the_store_is_asked_anew() -> None:
    """An answer that begins behind what is here now would leave a gap."""
    store, _ = make_store()
    request = make_request(300)
    store.arrived(request)
    assert store.matched_tokens(request, 128) is None
    store.heard(StoreNews(found={"r1": 256}))
    assert store.matched_tokens(request, 0) is None
    assert [lookup.computed for lookup in store.take_step().lookups] == [128, 0]


def test_what_is_offered_is_loaded() -> None:
    """The load names the tokens that are not here, and the request's blocks."""
    store, request, _ = asked()
    assert store.matched_tokens(request, 128) == 128
    store.allocated(request, [5, 6, 7], 128)
    (load,) = store.take_step().loads
    assert (load.request_id, load.tokens, load.block_ids) == ("r1", range(128, 256), (5, 6, 7))
    store.allocated(request, [5, 6, 7], 0)
    assert store.take_step().loads == []


def test_a_load_that_failed_is_not_tried_again() -> None:
    """What could not be fetched is computed, and then saved whole."""
    store, request, _ = asked()
    store.allocated(request, [5, 6, 7], 256)
    store.heard(StoreNews(failed={"r1"}))
    assert store.matched_tokens(request, 0) == 0
    number = run(store, r1=300).number
    store.heard(StoreNews(steps=[number]))
    (save,) = store.take_step().saves
    assert save.start == 0


def test_a_prompt_is_saved_when_it_is_computed() -> None:
    """A prompt that is prefilled in two steps is saved after the second, from where the store's part ends."""
    store, request, _ = asked(tokens=600)
    store.allocated(request, [5, 6, 7], 256)
    request.num_computed_tokens = 256
    first = run(store, r1=200)
    assert first.saves == []
    store.heard(StoreNews(steps=[first.number]))
    request.num_computed_tokens = 456
    last = run(store, r1=144)
    assert last.saves == store.take_step().saves == []
    store.heard(StoreNews(steps=[last.number]))
    (save,) = store.take_step().saves
    assert (save.prompt.request_id, save.start, save.block_ids) == ("r1", 256, (5, 6, 7))
    request.num_computed_tokens = 600
    assert run(store, r1=1).saves == []


@pytest.mark.parametrize("ends", ["before", "while", "after"])
def test_blocks_are_kept_while_they_are_read(ends: str) -> None:
    """A request that ends before its save does keeps its blocks; one whose save has ended does not."""
    store, request, _ = asked(found=0)
    if ends != "before":
        store.heard(StoreNews(steps=[run(store, r1=300).number]))
    if ends == "after":
        store.heard(StoreNews(saved={"r1"}))
    assert store.finished(request) is (ends == "while")
    step = store.take_step()
    assert step.finished == ["r1"]
    assert step.kept == (["r1"] if ends == "while" else [])
    assert store.finished(request) is False


def test_a_request_that_ends_with_its_prefill_is_saved() -> None:
    """Its blocks are kept before the worker has heard of the save, which comes with the same step."""
    store, request, _ = asked(found=0)
    step = run(store, r1=300)
    assert store.finished(request)
    store.heard(StoreNews(steps=[step.number]))
    step = store.take_step()
    assert step.kept == ["r1"]
    assert [save.prompt.request_id for save in step.saves] == ["r1"]


def test_preempted_requests_are_dropped() -> None:
    """Before their blocks are used otherwise, the worker is told; what it was not told yet it never is."""
    from vllm.v1.request import RequestStatus

    store, request, _ = asked(found=0)
    store.heard(StoreNews(steps=[run(store, r1=300).number]))
    request.status = RequestStatus.PREEMPTED
    step = run(store)
    assert step.dropped == ["r1"]
    assert step.saves == []
    assert not store.finished(request)


def test_who_may_not_save_does_not() -> None:
    """A consumer saves nothing, nor does anybody save what another engine computed, or what is too short."""
    for saves, foreign, tokens in ((False, False, 300), (True, True, 300), (True, False, 63)):
        store, _ = make_store(saves=saves)
        request = make_request(tokens)
        store.arrived(request)
        if foreign:
            store.foreign(request)
        step = run(store, r1=tokens)
        store.heard(StoreNews(steps=[step.number] if step.number else []))
        assert store.take_step().saves == []
        assert not store.finished(request)


def test_the_engines_speed_is_learned() -> None:
    """Steps teach how long a token takes, and a step that waited for another is not taken for slow."""
    store, clock = make_store()
    for number in range(6):
        request = make_request(500, f"r{number}")
        store.arrived(request)
    first = run(store, r0=400)
    second = run(store, r1=400)
    clock.s += 0.4
    store.heard(StoreNews(steps=[first.number]))
    clock.s += 0.4
    store.heard(StoreNews(steps=[second.number]))
    store.matched_tokens(request, 0)
    (lookup,) = store.take_step().lookups
    assert lookup.speed.seconds(range(400)) == pytest.approx(0.4, rel=0.01)


def test_prompts_have_everything_that_decides_their_kv() -> None:
    """Adapters by name and path, salts and tokens make other prompts; one given as embeddings has no name."""
    from kvserve_connector.prompts import stored_prompt

    plain, salted = make_request(64), make_request(64, cache_salt="tenant-1")
    lora = make_request(
        64, lora_request=SimpleNamespace(lora_name="a", lora_path="/adapters/a", lora_int_id=1)
    )
    prompts = [stored_prompt(request) for request in (plain, salted, lora)]
    extras = [prompt.extras for prompt in prompts if prompt is not None]
    assert extras == [(), ("salt tenant-1",), ("a", "/adapters/a")]
    plain.prompt_token_ids = None
    assert stored_prompt(plain) is None
