"""A control plane: what works on it, and that nothing of it stays."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from testcluster import Cluster, ClusterError, ClusterSpec, cleanup, existing_cluster, slots, start
from testcluster.errors import UnavailableHereError
from testcluster.launch import check_machine
from testcluster.layout import Layout
from testcluster.paths import SOURCE_DIR

Leftovers = Callable[[Layout], list[str]]


class Owner(Protocol):
    """A process that owns an instance; see conftest."""

    process: subprocess.Popen[str]

    def wait_ready(self) -> None:
        """Wait until the instance is ready."""

    def layout(self, nodes: int) -> Layout:
        """Wait for the instance's layout."""


def _wait_until(done: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something to come true."""
    deadline_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_version_and_certificate(control_plane: Cluster) -> None:
    """The server is the Kubernetes we build, reached with a certificate that is checked."""
    versions = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert versions["serverVersion"]["gitVersion"] == "v1.36.3"
    assert versions["clientVersion"]["gitVersion"] == "v1.36.3"
    assert "insecure-skip-tls-verify" not in control_plane.kubeconfig.read_text()


def test_service_account_token_and_rbac(control_plane: Cluster, namespace: str) -> None:
    """A token may do what its Role allows and nothing else."""
    run = control_plane.kubectl
    run("create", "serviceaccount", "reader", "-n", namespace)
    run("create", "role", "read", "--verb=get,list", "--resource=configmaps", "-n", namespace)
    account = f"{namespace}:reader"
    run("create", "rolebinding", "r", "--role=read", f"--serviceaccount={account}", "-n", namespace)
    token = run("create", "token", "reader", "-n", namespace).strip()
    cluster = json.loads(control_plane.kubeconfig.read_text())
    cluster["users"][0]["user"] = {"token": token}
    as_reader = ("--kubeconfig=/dev/stdin", "-n", namespace)
    shown = run(*as_reader, "get", "configmaps", "-o", "name", input=json.dumps(cluster))
    assert shown == "configmap/kube-root-ca.crt\n"
    with pytest.raises(ClusterError, match='cannot list resource "secrets"'):
        run(*as_reader, "get", "secrets", input=json.dumps(cluster))


@pytest.mark.slow
def test_deleted_namespace_goes(control_plane: Cluster) -> None:
    """The controller manager empties and removes a deleted namespace."""
    control_plane.kubectl("create", "namespace", "short-lived")
    control_plane.kubectl("delete", "namespace", "short-lived", "--timeout=30s")
    with pytest.raises(ClusterError, match="not found"):
        control_plane.kubectl("get", "namespace", "short-lived")


def test_helm_reaches_it(control_plane: Cluster, namespace: str) -> None:
    """Helm works with the cluster's environment."""
    assert json.loads(control_plane.helm("list", "-n", namespace, "-o", "json")) == []


def test_error_holds_what_kubectl_said(control_plane: Cluster) -> None:
    """A failed command names itself and gives standard error."""
    with pytest.raises(ClusterError, match=r'`kubectl get nothing` failed with 1.*"nothing"'):
        control_plane.kubectl("get", "nothing")


def test_existing_cluster_is_used(
    control_plane: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The user's cluster is reached by KUBECONFIG; what needs its machine says that it can't."""
    monkeypatch.setenv("KVSERVE_EXISTING_CLUSTER", "1")
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.setenv("PATH", control_plane.env["PATH"])
    existing = existing_cluster()
    assert existing is not None
    assert existing.kubectl("get", "namespace", "default", "-o", "name") == "namespace/default\n"
    with pytest.raises(UnavailableHereError, match="existing cluster"):
        existing.load_image(tmp_path)
    existing.stop()
    assert existing.kubectl("get", "namespace", "default", "-o", "name") == "namespace/default\n"


def test_existing_cluster_needs_a_kubeconfig(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVSERVE_EXISTING_CLUSTER without KUBECONFIG is an error that names it."""
    monkeypatch.setenv("KVSERVE_EXISTING_CLUSTER", "1")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(ClusterError, match="KUBECONFIG"):
        existing_cluster()


def test_node_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root the reason names root and the way with a cluster of one's own."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnavailableHereError, match=r"needs root.*KVSERVE_EXISTING_CLUSTER"):
        check_machine(ClusterSpec(nodes=1))


def test_fixture_skips_with_the_reason(tmp_path: Path) -> None:
    """A test that needs a node is skipped where there is no root, and says why."""
    (tmp_path / "conftest.py").write_text("import os\nos.geteuid = lambda: 1000\n")
    (tmp_path / "test_it.py").write_text("def test_it(cluster):\n    raise AssertionError\n")
    command = [sys.executable, "-m", "pytest", "-p", "testcluster.pytest_plugin", "-rs", "-q"]
    env = {k: v for k, v in os.environ.items() if k != "KVSERVE_EXISTING_CLUSTER"}
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**env, "PYTHONPATH": str(SOURCE_DIR)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 skipped" in done.stdout
    assert "a full node needs root" in done.stdout


def test_failed_start_shows_the_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends at once is named with its last lines."""

    def own() -> list[int]:
        return [i.slot for i in slots.instances() if i.owner_pid == os.getpid()]

    before = own()
    # etcd takes flags from the environment too: its own name is none of the members' names
    monkeypatch.setenv("ETCD_NAME", "stranger")
    with pytest.raises(ClusterError, match="etcd ended with 1"):
        start(ClusterSpec())
    assert own() == before


@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_killed_owner_leaves_nothing(
    owner: Callable[[int], Owner], leftovers: Leftovers, moment: str
) -> None:
    """SIGKILL of the owner's whole process group ends its instance, while it starts too."""
    one = owner(0)
    layout = one.layout(0)
    if moment == "ready":
        one.wait_ready()
    assert leftovers(layout) != []
    os.killpg(one.process.pid, signal.SIGKILL)
    _wait_until(lambda: not layout.run_dir.exists())
    assert leftovers(layout) == []


@pytest.mark.slow
def test_two_at_once_leave_nothing(leftovers: Leftovers) -> None:
    """Two instances start at the same time, know nothing of each other, and go."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, [ClusterSpec(), ClusterSpec()])
    with first, second:
        first.kubectl("create", "namespace", "only-here")
        assert "only-here" not in second.kubectl("get", "namespaces")
    assert leftovers(first.own) == []
    assert leftovers(second.own) == []


@pytest.mark.slow
def test_killed_guard_is_swept(leftovers: Leftovers) -> None:
    """SIGKILL of the guard ends all programs at once; the folder goes with the next sweep."""
    one = start(ClusterSpec())
    assert one.guard is not None
    one.guard.kill()
    run_dir = one.own.run_dir
    _wait_until(lambda: leftovers(one.own) == [str(run_dir)])
    (instance,) = [i for i in slots.instances() if i.run_dir == run_dir]
    assert not instance.alive
    with pytest.raises(ClusterError, match="guard ended with -9"):
        one.stop()
    assert slots.sweep_dead(cleanup.sweep) >= 1
    assert leftovers(one.own) == []


@pytest.mark.slow
def test_logs_are_kept(tmp_path: Path) -> None:
    """The logs are copied to where the caller wants them."""
    with start(ClusterSpec(keep_logs=tmp_path / "logs")):
        pass
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {"etcd.log", "apiserver.log", "controller-manager.log", "init.log"}


@pytest.mark.slow
def test_command_line(leftovers: Leftovers) -> None:
    """`up` outlives its process, `env` and `status` find the cluster, `down` removes it."""

    def run(*args: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "testcluster", *args],
            env={**os.environ, "PYTHONPATH": str(SOURCE_DIR)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    exports = run("up", "--nodes", "0")
    kubeconfig = exports.splitlines()[0].removeprefix("export KUBECONFIG=")
    layout = Layout.load(Path(kubeconfig).parent)
    slot = str(layout.slot)
    try:
        assert run("env", "--slot", slot) == exports
        line = next(x for x in run("status").splitlines() if x.startswith(f"{slot}\t"))
        assert line.split("\t") == [slot, "nodes=0", "by `up`", str(layout.run_dir), "running"]
        get = f"{exports}\nkubectl get namespace default -o name"
        shown = subprocess.run(["sh", "-c", get], capture_output=True, text=True, check=True)
        assert shown.stdout == "namespace/default\n"
    finally:
        run("down", "--slot", slot)
    assert leftovers(layout) == []
