"""Fixtures for tests that need a Kubernetes API server or a node.

With ``KVSERVE_EXISTING_CLUSTER=1`` and ``KUBECONFIG`` all of them use that cluster.
"""

import os
import uuid
from collections.abc import Iterator

import pytest

from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import UnavailableHereError
from testcluster.launch import ClusterSpec, start


def _serve(spec: ClusterSpec) -> Iterator[Cluster]:
    """Yield the user's cluster or a new one; skip where neither can be had."""
    existing = existing_cluster()
    if existing is not None:
        yield existing
        return
    try:
        cluster = start(spec)
    except UnavailableHereError as error:
        pytest.skip(str(error))
    with cluster:
        yield cluster


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with etcd and controller manager, without a node, shared by the session.

    Pods stay pending and Jobs never run. Use the fixture ``namespace`` to stay apart.
    """
    yield from _serve(ClusterSpec())


@pytest.fixture
def fresh_control_plane() -> Iterator[Cluster]:
    """A control plane for one test alone; takes 3 s."""
    yield from _serve(ClusterSpec())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A full one-node cluster, shared by the session; needs root."""
    yield from _serve(ClusterSpec(nodes=1))


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace for one test, deleted after it.

    It is in ``cluster`` if the test uses that fixture, else in ``control_plane``.
    """
    name = "cluster" if "cluster" in request.fixturenames else "control_plane"
    server: Cluster = request.getfixturevalue(name)
    unique = f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    server.kubectl("create", "namespace", unique)
    yield unique
    server.kubectl("delete", "namespace", unique, "--wait=false")
