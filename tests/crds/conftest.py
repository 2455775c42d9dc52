"""An API server with the CRD, and a namespace of it."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import kube_api
from kube_api import Api
from testcluster.cluster import Cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(control_plane: Cluster) -> Iterator[str]:
    """Address of an API server with the CRD."""
    control_plane.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/kvservepolicies.yaml"))
    control_plane.wait_established("kvservepolicies.kvserve.io")
    with kube_api.kubectl_proxy(control_plane) as url:
        yield url


@pytest.fixture(scope="module")
def shared_api(served: str, control_plane: Cluster) -> Iterator[Api]:
    """A namespace of that API server."""
    name = f"crds-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", name)
    made = Api(served, name)
    yield made
    made.close()
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def api(shared_api: Api) -> Iterator[Api]:
    """That namespace, without policies."""
    yield shared_api
    for policy in shared_api.find("kvp"):
        shared_api.delete("kvp", policy["metadata"]["name"])
