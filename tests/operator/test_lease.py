"""Leader election against a real API server, with clocks of our own."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import kopf
import pytest

from kube_api import Api
from kvserve_operator.client import Client, NotLeaderError
from kvserve_operator.lease import Leadership

Compete = Callable[[str], tuple[Leadership, list[float]]]


@pytest.fixture
async def client(proxy: str) -> AsyncIterator[Client]:
    """A client as administrator."""
    async with Client(lambda: kopf.ConnectionInfo(server=proxy)) as made:
        yield made


@pytest.fixture
def compete(client: Client, alone: Api) -> Compete:
    """Make a competitor with a clock that stands at 1000 s."""

    def make(identity: str) -> tuple[Leadership, list[float]]:
        clock = [1000.0]
        leadership = Leadership(
            client, namespace=alone.namespace, identity=identity, clock=lambda: clock[0]
        )
        return leadership, clock

    return make


async def test_the_first_leads_until_it_is_silent(compete: Compete) -> None:
    """Who came first leads; another takes over 15 s after the last renewal, when the first has long stopped."""
    one, one_clock = compete("one")
    two, two_clock = compete("two")
    gained: list[str] = []
    one.on_gain = lambda: gained.append("one")
    two.on_gain = lambda: gained.append("two")
    await one.step()
    await two.step()
    assert (one.held(), two.held()) == (True, False)
    for _ in range(3):
        one_clock[0] += 5
        two_clock[0] += 5
        await one.step()
        await two.step()
    assert (one.held(), two.held()) == (True, False)

    one_clock[0] += 10
    assert not one.held()
    two_clock[0] += 14.9
    await two.step()
    assert not two.held()
    two_clock[0] += 0.2
    await two.step()
    assert two.held()
    await one.step()
    assert not one.held()
    assert gained == ["one", "two"]


async def test_a_lease_given_back_is_free_at_once(compete: Compete, alone: Api) -> None:
    """Who ends in order lets the next lead without a wait."""
    one, _ = compete("one")
    two, _ = compete("two")
    await one.step()
    await two.step()
    await one.release()
    assert not one.held()
    await two.step()
    assert two.held()
    lease = alone.get("leases", "kvserve-operator")
    assert lease
    assert lease["spec"]["holderIdentity"] == "two"
    assert lease["spec"]["leaseTransitions"] == 2


async def test_two_at_once_are_one(compete: Compete) -> None:
    """Of many that try at the same moment exactly one leads."""
    competitors = [compete(str(n))[0] for n in range(5)]
    await asyncio.gather(*(c.step() for c in competitors))
    assert [c.held() for c in competitors].count(True) == 1


async def test_a_write_without_the_lease_is_stopped(client: Client, alone: Api) -> None:
    """The client sends nothing for who does not lead."""
    client.may_write = lambda: False
    path = f"/api/v1/namespaces/{alone.namespace}/configmaps"
    with pytest.raises(NotLeaderError):
        await client.write(
            "POST", path, json.loads('{"metadata": {"name": "x"}}'), kind="ConfigMap"
        )
    assert alone.get("configmaps", "x") is None
