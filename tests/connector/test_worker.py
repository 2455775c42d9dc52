"""The worker half beside an engine: where the cache can't be carried, and where a step has nothing to compute."""

import logging
import threading
import warnings
from dataclasses import replace

import pytest

from kv_loopback import ENGINE
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.handover import Lease, Load
from kvserve_connector.leases import SENT
from kvserve_connector.remote import Remote

pytestmark = pytest.mark.slow  # importing vLLM takes its time


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    """Import vLLM, whose own dependencies warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.distributed.kv_transfer.kv_connector.v1.base  # noqa: F401


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        pytest.param(
            replace(ENGINE, groups=(), layout=None, unsupported="rings are not known"),
            "rings are not known",
            id="unknown",
        ),
        pytest.param(ENGINE, "no KV cache was registered for layer layers.0", id="not-there"),
    ],
)
def test_nothing_is_carried_and_nothing_fails(
    engine: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such an engine starts, says why, serves no lease, and has each fetch fail at once by its reason."""
    from kvserve_connector.metadata import StepMetadata
    from kvserve_connector.worker import WorkerHalf

    config = ConnectorConfig(listen_host="127.0.0.1", listen_port=0)
    half = WorkerHalf(config, engine, is_producer=True, is_consumer=True)  # type: ignore[arg-type]
    try:
        with caplog.at_level(logging.WARNING):
            half.open({}, {})
        assert why in caplog.text
        assert half.address is None
        remote = Remote(host="127.0.0.1", port=1, engine_id="e", request_id="r", tokens=9)
        load = Load(
            request_id="a",
            remote=remote,
            tokens=range(9),
            prompt_digest="d",
            block_ids=(),
            workload="default",
        )
        half.take(StepMetadata(loads=[load], releases=[remote], cancelled=["b"], unserved=2))
        results = half.results()
        assert results.finished_recving == results.failed_recving == {"a"}
        assert half.take_totals() == {
            "opaque": {"Unsupported": 1},
            "failures": {"send Unsupported": 2, "receive Unsupported": 1},
        }
    finally:
        half.close()


@pytest.mark.parametrize("idle", [True, False])
def test_a_step_that_computes_nothing_waits_for_a_transfer(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prefill is being sent, a step returns as soon as that has ended if it computes nothing, else at once."""
    from kvserve_connector import worker
    from kvserve_connector.metadata import StepMetadata

    monkeypatch.setattr(worker, "IDLE_S", 30.0)
    config = ConnectorConfig(listen_host="127.0.0.1", listen_port=0)
    half = worker.WorkerHalf(config, ENGINE, is_producer=True, is_consumer=False)
    lease = Lease(
        request_id="a",
        tokens=9,
        prompt_digest="d",
        block_ids=((1,),),
        workload="default",
        model_s=0.1,
    )
    half.take(StepMetadata(leases=[lease], idle=True))
    # nobody fetches it yet, which may take as long as its lease
    assert half.results().finished_sending == set()
    claim = half._leases.claim("a", 0.0)
    half.take(StepMetadata(idle=idle))
    timer = threading.Timer(0.1, half._leases.end, (claim.prefill.request_id, SENT))
    timer.start()
    try:
        assert half.results().finished_sending == ({"a"} if idle else set())
    finally:
        timer.join()
        half.close()
