"""The chart installed on a real node: its pods start as they are, and `helm test` passes."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testcluster import ClusterSpec, hostpods, start
from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import UnavailableHereError

SYSTEM = "kvserve-system"

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def node() -> Iterator[Cluster]:
    """A node of this file's own: the CRD is one for all namespaces."""
    if existing_cluster() is not None:
        pytest.skip("installs and removes the CRD: not on a cluster that others use")
    try:
        cluster = start(ClusterSpec(nodes=1))
    except UnavailableHereError as error:
        pytest.skip(str(error))
    with cluster:
        yield cluster


def test_install_and_test(node: Cluster, chart: Path) -> None:
    """Two operators and the controller get ready without a restart; then helm's own test passes."""
    values = yaml.safe_dump({**hostpods.chart_values(), "networkPolicy": {"enabled": True}})
    node.helm(
        "install", "kvserve", str(chart), "-n", SYSTEM, "--create-namespace", "--values", "-",
        "--set", "operator.replicas=2", "--wait", "--timeout", "120s", input=values,
    )  # fmt: skip
    template = "{range .items[*]}{.status.containerStatuses[*].restartCount}{end}"
    restarts = node.kubectl("get", "pods", "-n", SYSTEM, "-o", f"jsonpath={template}")
    assert restarts == "000"
    assert "Succeeded" in node.helm("test", "kvserve", "-n", SYSTEM, "--timeout", "120s")
    left = node.kubectl("get", "pods,serviceaccounts", "-n", SYSTEM, "-o", "name")
    assert "kvserve-test" not in left
    holder = node.kubectl("get", "lease", "-n", SYSTEM, "-o", "jsonpath={.items[*].metadata.name}")
    assert holder == "kvserve-operator"


def test_rights_are_enough_in_one_namespace(node: Cluster, chart: Path) -> None:
    """With Roles in one namespace only, a policy there is answered, and nothing is forbidden."""
    values = yaml.safe_dump(hostpods.chart_values())
    node.helm(
        "upgrade", "kvserve", str(chart), "-n", SYSTEM, "--values", "-", "--wait",
        "--set", "watchNamespaces={default}", "--timeout", "120s", input=values,
    )  # fmt: skip
    targets = [
        {"role": role, "selector": {"matchLabels": {"app": role.lower()}}}
        for role in ("Prefill", "Decode")
    ]
    policy = {
        "apiVersion": "kvserve.io/v1alpha1",
        "kind": "KVServePolicy",
        "metadata": {"name": "chat"},
        "spec": {
            "model": {"name": "m", "source": {"pvc": {"claimName": "models"}}},
            "targets": targets,
            "slo": {"goal": "MinimizeLatency"},
        },
    }
    for namespace in ("default", "kube-public"):
        node.kubectl("apply", "-n", namespace, "-f", "-", input=yaml.safe_dump(policy))
    deadline_s = time.monotonic() + 60
    while True:
        status = yaml.safe_load(node.kubectl("get", "kvp", "chat", "-o", "yaml")).get("status", {})
        types = {condition["type"] for condition in status.get("conditions", [])}
        jobs = node.kubectl("get", "jobs", "-n", "default", "-o", "name")
        # one condition of each writer, and the operator's child
        if {"Ready", "Programmed"} <= types and "chat-job-" in jobs:
            break
        assert time.monotonic() < deadline_s, (status, jobs, logs(node))
        time.sleep(0.5)
    assert "orbidden" not in logs(node)
    other = yaml.safe_load(node.kubectl("get", "kvp", "chat", "-n", "kube-public", "-o", "yaml"))
    assert "status" not in other
    node.kubectl("delete", "kvp", "chat", "-n", "default")
    node.kubectl("wait", "--for=delete", "jobs", "--all", "-n", "default", "--timeout=30s")


def logs(node: Cluster) -> str:
    """Return what operator and controller have logged."""
    names = ("deployment/kvserve-operator", "deployment/kvserve-controller")
    return "".join(node.kubectl("logs", "-n", SYSTEM, name) for name in names)
