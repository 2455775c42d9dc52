"""One reconciler in this process, against a real API server: what watches can miss."""

import asyncio
from collections.abc import AsyncIterator

import kopf
import pytest

import samples
from kube_api import Api
from kvserve_operator.apply import Executor
from kvserve_operator.client import Client
from kvserve_operator.config import ProfilerConfig
from kvserve_operator.events import Recorder
from kvserve_operator.jobs import JobFacts
from kvserve_operator.observed import PolicyFacts
from kvserve_operator.reconcile import Reconciler
from kvserve_operator.sets import SetFacts


@pytest.fixture
async def reconciler(proxy: str) -> AsyncIterator[Reconciler]:
    """A reconciler whose cache the test fills."""
    async with Client(lambda: kopf.ConnectionInfo(server=proxy)) as client:
        executor = Executor(client, Recorder(client))
        config = ProfilerConfig(image="profiler:1")
        yield Reconciler(client, executor, config, leads=lambda: True)


async def test_no_children_for_a_policy_that_is_gone(alone: Api, reconciler: Reconciler) -> None:
    """A policy whose deletion the watch missed gets no children, and is forgotten."""
    reconciler.cache.put(PolicyFacts.read(alone.policy("ghost")))
    alone.delete("kvp", "ghost")
    await reconciler.reconcile((alone.namespace, "ghost"))
    assert alone.children("ghost") == []
    assert reconciler.cache.policy_keys() == []


async def test_a_job_that_is_gone_is_forgotten(alone: Api, reconciler: Reconciler) -> None:
    """Checked against the API server, children whose deletion the watch missed are forgotten, others stay."""
    key = (alone.namespace, "chat")
    reconciler.cache.put(PolicyFacts.read(alone.policy("chat")))
    await reconciler.reconcile(key)
    job = alone.wait_job("chat")
    name = alone.write_set(job, samples.pareto())
    reconciler.take(alone.get("configmaps", name) or {})
    alone.request(
        "DELETE", "jobs", job["metadata"]["name"], params={"propagationPolicy": "Background"}
    )
    assert len(reconciler.cache.children(JobFacts, *key)) == 1
    # the list may come from the API server's own cache, which is a moment behind
    for _ in range(50):
        await reconciler.refresh(key)
        if reconciler.cache.children(JobFacts, *key) == ():
            break
        await asyncio.sleep(0.1)
    assert reconciler.cache.children(JobFacts, *key) == ()
    assert len(reconciler.cache.children(SetFacts, *key)) == 1
    await reconciler.reconcile(key)
    assert alone.condition("chat", "Profiled")[:2] == ("True", "Profiled")


async def test_the_second_look_writes_nothing(alone: Api, reconciler: Reconciler) -> None:
    """What was just written is known before any watch tells of it, so looking again at once changes nothing."""
    key = (alone.namespace, "chat")
    reconciler.cache.put(PolicyFacts.read(alone.policy("chat")))
    await reconciler.reconcile(key)
    before = (alone.get("kvp", "chat") or {})["metadata"]["resourceVersion"]
    job = alone.wait_job("chat")["metadata"]
    await reconciler.reconcile(key)
    assert (alone.get("kvp", "chat") or {})["metadata"]["resourceVersion"] == before
    assert alone.wait_job("chat")["metadata"]["uid"] == job["uid"]
    assert len(alone.find("events")) <= 2
