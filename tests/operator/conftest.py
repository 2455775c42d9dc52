"""A real operator process between the tests and a real API server.

It talks through a gate as the service account whose permissions ``docs/operations.md`` lists.
"""

import signal
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kube_api
from kube_api import Api
from operator_gate import Gate
from operator_process import ROOT, Operator, grant, launch
from testcluster.cluster import Cluster

StartOperator = Callable[..., Operator]


@pytest.fixture(scope="session")
def proxy(control_plane: Cluster) -> Iterator[str]:
    """Address of an API server that knows KVServePolicies."""
    control_plane.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/kvservepolicies.yaml"))
    control_plane.wait_established("kvservepolicies.kvserve.io")
    with kube_api.kubectl_proxy(control_plane) as url:
        yield url


@pytest.fixture(scope="session")
def start_operator(
    control_plane: Cluster, proxy: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartOperator]:
    """Start operators of one namespace each; all end with the session."""
    running: list[Operator] = []
    gates: list[Gate] = []

    def start(namespace: str, *, gate: Gate | None = None, **options: Any) -> Operator:
        if gate is None:
            gate = Gate(upstream=proxy, user=grant(control_plane, namespace))
            gate.start()
            gates.append(gate)
        operator = launch(
            control_plane,
            gate,
            namespace,
            tmp_path_factory.mktemp("operator"),
            "profiler:1",
            **options,
        )
        running.append(operator)
        return operator

    yield start
    for operator in running:
        operator.end(signal.SIGKILL)
    for gate in gates:
        gate.stop()


@pytest.fixture(scope="module")
def shared(control_plane: Cluster, proxy: str, start_operator: StartOperator) -> Iterator[Api]:
    """A namespace that an operator serves, shared by the tests of a module; use policy names of your own."""
    name = f"operator-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name)
    # the pods of profiling Jobs must be allowed where nothing but harmless pods is
    control_plane.kubectl(
        "label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"
    )
    operator = start_operator(name)
    operator.wait_ready()
    api = Api(proxy, name)
    yield api
    api.close()
    operator.end()
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def alone(proxy: str, namespace: str) -> Iterator[Api]:
    """A namespace for one test, without an operator yet."""
    api = Api(proxy, namespace)
    yield api
    api.close()
