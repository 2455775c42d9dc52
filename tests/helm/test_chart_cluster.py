"""The chart on a real API server: admission, rights, upgrade and removal. No node, so pods stay pending."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster import ClusterSpec, start
from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import ClusterError, UnavailableHereError

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
SYSTEM = "kvserve-system"
POLICY = {
    "apiVersion": "kvserve.io/v1alpha1",
    "kind": "KVServePolicy",
    "metadata": {"name": "chat", "namespace": "default"},
    "spec": {
        "model": {"name": "m"},
        "targets": [
            {"role": "Prefill", "selector": {"matchLabels": {"app": "prefill"}}},
            {"role": "Decode", "selector": {"matchLabels": {"app": "decode"}}},
        ],
        "slo": {"goal": "MinimizeLatency"},
    },
}

# what the API server lets every account do
EVERYBODY = {
    ("selfsubjectreviews.authentication.k8s.io", "", "create"),
    ("selfsubjectaccessreviews.authorization.k8s.io", "", "create"),
    ("selfsubjectrulesreviews.authorization.k8s.io", "", "create"),
}
READ = ("get", "list", "watch")
WRITE = ("create", "patch", "delete")
CONTROLLER = {
    *(("kvservepolicies.kvserve.io", "", verb) for verb in READ),
    ("kvservepolicies.kvserve.io/status", "", "patch"),
    *(("configmaps", "", verb) for verb in READ),
}
OPERATOR = {
    *(("kvservepolicies.kvserve.io", "", verb) for verb in READ),
    ("kvservepolicies.kvserve.io/status", "", "patch"),
    *(("pods", "", verb) for verb in ("list", "watch")),
    *(("configmaps", "", verb) for verb in (*READ, *WRITE)),
    *(("jobs.batch", "", verb) for verb in ("list", "watch", *WRITE)),
    *(("serviceaccounts", "", verb) for verb in WRITE),
    *(("roles.rbac.authorization.k8s.io", "", verb) for verb in WRITE),
    *(("rolebindings.rbac.authorization.k8s.io", "", verb) for verb in WRITE),
    *(("events", "", verb) for verb in ("create", "patch")),
}
LEADER = {
    ("leases.coordination.k8s.io", "", "create"),
    ("leases.coordination.k8s.io", "kvserve-operator", "get"),
    ("leases.coordination.k8s.io", "kvserve-operator", "update"),
}


def rights(cluster: Cluster, account: str, namespace: str) -> set[tuple[str, str, str]]:
    """Return what `kubectl auth can-i --list` says of an account: (resource, name, verb)."""
    user = f"--as=system:serviceaccount:{account}"
    text = cluster.kubectl("auth", "can-i", "--list", user, "-n", namespace, "--no-headers")
    found = set()
    for line in text.splitlines():
        match = re.fullmatch(r"(\S*)\s+\[(.*?)\]\s+\[(.*?)\]\s+\[(.*?)\]", line.rstrip())
        assert match, line
        if match[1]:
            names = match[3].split() or [""]
            found |= {(match[1], name, verb) for name in names for verb in match[4].split()}
    return found


def wait_pods(cluster: Cluster, namespace: str, count: int) -> list[Json]:
    """Wait until a namespace has as many pods and return them."""
    deadline_s = time.monotonic() + 20
    while True:
        pods: list[Json] = json.loads(
            cluster.kubectl("get", "pods", "-n", namespace, "-o", "json")
        )["items"]
        if len(pods) >= count or time.monotonic() > deadline_s:
            events = cluster.kubectl("get", "events", "-n", namespace)
            assert len(pods) == count, events
            return pods
        time.sleep(0.2)


@pytest.fixture(scope="module")
def plane() -> Iterator[Cluster]:
    """A control plane of this file's own: the CRD is one for all namespaces."""
    if existing_cluster() is not None:
        pytest.skip("installs and removes the CRD: not on a cluster that others use")
    try:
        cluster = start(ClusterSpec())
    except UnavailableHereError as error:
        pytest.skip(str(error))
    with cluster:
        for name in ("team-a", "team-b"):
            cluster.kubectl("create", "namespace", name)
        yield cluster


@pytest.fixture(scope="module")
def installed(plane: Cluster, chart: Path) -> Cluster:
    """The chart, installed without any value into a namespace that admits restricted pods only."""
    plane.kubectl("create", "namespace", SYSTEM)
    label = "pod-security.kubernetes.io/enforce=restricted"
    plane.kubectl("label", "namespace", SYSTEM, "default", label)
    plane.helm("install", "kvserve", str(chart), "-n", SYSTEM)
    plane.wait_established("kvservepolicies.kvserve.io")
    return plane


def test_restricted_namespace_admits_pods(installed: Cluster, render: Callable[..., Any]) -> None:
    """Operator, controller and test pods pass the restricted pod security standard."""
    pods = wait_pods(installed, SYSTEM, 2)
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert components == {"operator", "controller"}
    (test,) = [item for item in render(namespace=SYSTEM) if item["kind"] == "Pod"]
    account = yaml.safe_dump({**test, "spec": {**test["spec"], "serviceAccountName": "default"}})
    installed.kubectl("apply", "--dry-run=server", "-f", "-", input=account)


def test_restricted_namespace_refuses_others(installed: Cluster) -> None:
    """The label is in force: a pod as root is refused there."""
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        installed.kubectl("run", "root", "--image=x", "-n", SYSTEM)


@pytest.mark.parametrize(
    ("account", "namespace", "expected"),
    [
        pytest.param("operator", SYSTEM, OPERATOR | LEADER, id="operator-at-home"),
        pytest.param("operator", "team-a", OPERATOR, id="operator-elsewhere"),
        pytest.param("controller", SYSTEM, CONTROLLER, id="controller-at-home"),
        pytest.param("controller", "team-a", CONTROLLER, id="controller-elsewhere"),
    ],
)
def test_accounts_may_do_exactly_this(
    installed: Cluster, account: str, namespace: str, expected: set[tuple[str, str, str]]
) -> None:
    """The API server's list of an account's rights is this one, no more and no less."""
    found = rights(installed, f"{SYSTEM}:kvserve-{account}", namespace)
    assert found - EVERYBODY == expected


def test_operator_grants_no_more_than_it_has(installed: Cluster) -> None:
    """It may give a profiling run rights on ConfigMaps, and the API server stops it at secrets."""
    user = f"--as=system:serviceaccount:{SYSTEM}:kvserve-operator"
    role = ("create", "role", "run", "-n", "team-a", "--dry-run=server", user, "--verb=get,patch")
    installed.kubectl(*role, "--resource=configmaps")
    with pytest.raises(
        ClusterError, match="attempting to grant RBAC permissions not currently held"
    ):
        installed.kubectl(*role, "--resource=secrets")


@pytest.mark.parametrize(
    ("verb", "role"), [("list", "view"), ("create", "edit"), ("delete", "admin")]
)
def test_policies_join_the_clusters_roles(installed: Cluster, verb: str, role: str) -> None:
    """Who may view, edit or administrate a namespace may do so with its policies."""
    user = f"person-{role}"
    installed.kubectl(
        "create", "rolebinding", user, "-n", "team-b", f"--clusterrole={role}", f"--user={user}"
    )
    asked = ("auth", "can-i", "-n", "team-b", f"--as={user}")
    assert installed.kubectl(*asked, verb, "kvservepolicies.kvserve.io") == "yes\n"
    if role == "view":
        with pytest.raises(ClusterError):
            installed.kubectl(*asked, "create", "kvservepolicies.kvserve.io")


def test_everything_is_valid_to_the_server(plane: Cluster, render: Callable[..., Any]) -> None:
    """With every value set, each rendered object passes a server-side dry run without a warning."""
    values: Json = {
        "watchNamespaces": ["team-a"],
        "operator": {
            "replicas": 3,
            "extraEnv": [{"name": "A", "value": "b"}],
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
            "nodeSelector": {"a": "b"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
        },
        "imagePullSecrets": [{"name": "pull"}],
        "otel": {"endpoint": "http://collector:4318"},
        "networkPolicy": {"enabled": True},
    }
    for objects in (render({}, namespace="team-b"), render(values, namespace="team-b")):
        # a pod's service account has to exist, also in a dry run
        rest = yaml.safe_dump_all(item for item in objects if item["kind"] != "Pod")
        plane.kubectl(
            "apply", "--server-side", "--force-conflicts", "--dry-run=server",
            "--validate=strict", "-f", "-", input=rest,
        )  # fmt: skip


@pytest.mark.slow
def test_release_comes_and_goes(installed: Cluster, chart: Path) -> None:
    """Upgrade changes what it should; uninstall leaves the CRD and the policies; install again works."""
    installed.kubectl("apply", "-f", "-", input=json.dumps(POLICY))
    installed.helm(
        "upgrade", "kvserve", str(chart), "-n", SYSTEM, "--set", "operator.replicas=2",
        "--set", "watchNamespaces={team-a}",
    )  # fmt: skip
    assert "kvserve-operator" in installed.kubectl("get", "pdb", "-n", SYSTEM)
    account = f"{SYSTEM}:kvserve-operator"
    assert rights(installed, account, "team-a") - EVERYBODY == OPERATOR
    assert rights(installed, account, "team-b") - EVERYBODY == set()
    assert rights(installed, account, SYSTEM) - EVERYBODY == LEADER
    installed.helm("uninstall", "kvserve", "-n", SYSTEM, "--wait")
    left = installed.kubectl("get", "deploy,svc,sa,cm,role,rolebinding,pdb", "-A", "-o", "name")
    assert "kvserve" not in left
    assert "kvserve" not in installed.kubectl("get", "clusterrole,clusterrolebinding", "-o", "name")
    assert "chat" in installed.kubectl("get", "kvservepolicies", "-n", "default", "-o", "name")
    installed.helm("install", "kvserve", str(chart), "-n", SYSTEM)
    assert "chat" in installed.kubectl("get", "kvservepolicies", "-n", "default", "-o", "name")
    installed.helm("upgrade", "kvserve", str(chart), "-n", SYSTEM, "--set", "crds.keep=false")
    installed.helm("uninstall", "kvserve", "-n", SYSTEM, "--wait")
    assert installed.kubectl("get", "crd", "-o", "name") == ""
