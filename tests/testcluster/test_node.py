"""A full node: pods, names, rights, shaped links, and that nothing of it stays."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from testcluster import Cluster, ClusterError, ClusterSpec, cleanup, hostpods, images, slots, start
from testcluster.layout import Layout

pytestmark = [pytest.mark.slow, pytest.mark.alone]

Leftovers = Callable[[Layout], list[str]]
HostState = Callable[[], dict[str, str]]

_SEND = """
import socket
with socket.create_server(("0.0.0.0", 9000)) as server:
    while True:
        peer, _ = server.accept()
        with peer:
            peer.sendall(bytes(int(peer.recv(16))))
"""

_RECEIVE = """
import socket, sys, time
address, size = sys.argv[1], int(sys.argv[2])
began_s = time.monotonic()
with socket.create_connection((address, 9000)) as peer:
    peer.sendall(str(size).encode())
    got = 0
    while data := peer.recv(1 << 20):
        got += len(data)
assert got == size
print(8e-6 * size / (time.monotonic() - began_s))
"""

_ABOUT = """
import getpass, json, os, socket, sys
import click, kvserve_api
try:
    open("/usr/x", "w")
except OSError as error:
    refused = error.strerror
print(json.dumps({
    "uid": os.getuid(), "user": getpass.getuser(), "prefix": sys.prefix, "refused": refused,
    "dns": socket.getaddrinfo("kube-dns.kube-system", 53, socket.AF_INET)[0][4][0],
}))
"""


class Owner(Protocol):
    """A process that owns an instance; see conftest."""

    process: subprocess.Popen[str]

    def wait_ready(self) -> None:
        """Wait until the instance is ready."""

    def layout(self, nodes: int) -> Layout:
        """Wait for the instance's layout."""


def _pod(name: str, *command: str, node: str | None = None) -> str:
    """Return a restricted pod of ours as JSON."""
    security = {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsUser": 1000,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "main",
                "image": "kvserve/test:1",
                "command": list(command),
                "securityContext": security,
            }
        ],
    }
    if node is not None:
        spec["nodeName"] = node
    labels = {"app": name}
    metadata = {"name": name, "labels": labels}
    pod = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata}
    return json.dumps({**pod, "spec": hostpods.hostify(spec)})


def _run_ready(cluster: Cluster, namespace: str, *pods: str) -> None:
    """Create pods and wait until they are ready."""
    for pod in pods:
        cluster.kubectl("apply", "-n", namespace, "-f", "-", input=pod)
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "--all")


def _receive(cluster: Cluster, namespace: str, address: str, size: int) -> float:
    """Return the goodput in 10^6 bit/s at which pod "receiver" gets bytes from a sender."""
    inside = ("python", "-c", _RECEIVE, address, str(size))
    return float(cluster.kubectl("exec", "-n", namespace, "receiver", "--", *inside))


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """A cluster of two nodes."""
    with start(ClusterSpec(nodes=2)) as cluster:
        yield cluster


def test_pod_has_our_python_as_user_1000(cluster: Cluster, namespace: str) -> None:
    """A restricted pod imports our packages from the host, can't write, and resolves Services."""
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=_pod("a", "python", "-c", _ABOUT))
    done = "--for=jsonpath={.status.phase}=Succeeded"
    cluster.kubectl("wait", "-n", namespace, done, "pod/a", "--timeout=30s")
    about = json.loads(cluster.kubectl("logs", "-n", namespace, "a"))
    assert about == {
        "uid": 1000,
        "user": "kvserve",
        "prefix": sys.prefix,
        "refused": "Read-only file system",
        "dns": cluster.own.dns_ip,
    }


def test_shaped_link(cluster: Cluster, namespace: str) -> None:
    """The rate between two pods is as set, moves live, and binds no other traffic."""
    sender, other = _pod("sender", "python", "-c", _SEND), _pod("other", "python", "-c", _SEND)
    _run_ready(cluster, namespace, sender, other, _pod("receiver", "sleep", "600"))
    sender_ip, other_ip = (cluster.pod_ip(pod, namespace) for pod in ("sender", "other"))
    assert _receive(cluster, namespace, sender_ip, 10_000_000) > 400
    for rate, size in ((80, 10_000_000), (20, 2_500_000), (200, 20_000_000)):
        cluster.shape("sender", "receiver", rate, namespace)
        assert _receive(cluster, namespace, sender_ip, size) == pytest.approx(rate, rel=0.2)
    assert _receive(cluster, namespace, other_ip, 10_000_000) > 400
    cluster.unshape("sender", "receiver", namespace)
    assert _receive(cluster, namespace, sender_ip, 10_000_000) > 400


def test_rate_changes_while_data_flows(cluster: Cluster, namespace: str) -> None:
    """A transfer that would take 8 s ends soon after the link became fast."""
    sender = _pod("sender", "python", "-c", _SEND)
    _run_ready(cluster, namespace, sender, _pod("receiver", "sleep", "600"))
    sender_ip = cluster.pod_ip("sender", namespace)
    cluster.shape("sender", "receiver", 20, namespace)
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(_receive, cluster, namespace, sender_ip, 20_000_000)
        time.sleep(2.0)
        assert not transfer.done()
        cluster.shape("sender", "receiver", 1000, namespace)
        # all at 20 Mbit/s would give 19, all at 1000 Mbit/s about 900
        assert 24 < transfer.result(10) < 400


def test_loaded_image_runs(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    """An image written by Python and loaded into the node runs by its entry point."""
    assert cluster.bin_dir is not None
    name, program = "kvserve.test/loaded:1", {"run": cluster.bin_dir / "pause"}
    image = images.Image(name=name, programs=program, entrypoint=["/run"])
    images.write_archive(image, tmp_path / "image.tar")
    cluster.load_image(tmp_path / "image.tar")
    run = ("run", "loaded", "-n", namespace, f"--image={name}", "--image-pull-policy=Never")
    cluster.kubectl(*run)
    wait = ("wait", "-n", namespace, "--for=condition=Ready", "pod/loaded", "--timeout=30s")
    cluster.kubectl(*wait)


def test_shape_refuses_nonsense(cluster: Cluster, namespace: str) -> None:
    """A rate that is none and a pod that is none are errors that say so."""
    _run_ready(cluster, namespace, _pod("receiver", "sleep", "600"))
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ClusterError, match="megabits_per_s"):
            cluster.shape("receiver", "receiver", rate, namespace)
    with pytest.raises(ClusterError, match='"nobody" not found'):
        cluster.shape("nobody", "receiver", 80, namespace)


def test_host_reaches_pods_and_services(cluster: Cluster, namespace: str) -> None:
    """This process can talk to a pod and to a Service by their addresses."""
    server = _pod("web", "python", "-m", "http.server", "9000", "--directory", "/etc/ssl")
    _run_ready(cluster, namespace, server)
    cluster.kubectl("expose", "pod", "web", "-n", namespace, "--port=80", "--target-port=9000")
    path = "jsonpath={.spec.clusterIP}"
    service_ip = cluster.kubectl("get", "service", "web", "-n", namespace, "-o", path)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for url in (f"http://{cluster.pod_ip('web', namespace)}:9000/", f"http://{service_ip}/"):
        with opener.open(url, timeout=10) as response:
            assert b"certs" in response.read()


def test_pods_reach_the_host(cluster: Cluster, namespace: str) -> None:
    """A pod can talk to a server of this process, by the host's address in the layout."""
    with socket.create_server((cluster.own.host_ip, 0)) as server:
        port = server.getsockname()[1]
        call = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])))"
        pod = _pod("caller", "python", "-c", call, cluster.own.host_ip, str(port))
        cluster.kubectl("apply", "-n", namespace, "-f", "-", input=pod)
        server.settimeout(30)
        peer, address = server.accept()
        peer.close()
    assert address[0] == cluster.pod_ip("caller", namespace)


def test_kubelet_wants_a_certificate(cluster: Cluster) -> None:
    """A kubelet answers nobody who does not say who he is, with a certificate of our authority."""
    context = ssl.create_default_context(cafile=str(cluster.own.pki_dir / "ca.crt"))
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(*handlers)
    with pytest.raises(urllib.error.HTTPError, match="401") as caught:
        opener.open(f"https://{cluster.own.node_ip(0)}:10250/pods", timeout=10)
    caught.value.close()


def test_two_nodes(two_nodes: Cluster) -> None:
    """Pods run on both nodes and reach each other."""
    first, second = (two_nodes.own.node_name(index) for index in (0, 1))
    sender = _pod("sender", "python", "-c", _SEND, node=first)
    _run_ready(two_nodes, "default", sender, _pod("receiver", "sleep", "600", node=second))
    two_nodes.shape("sender", "receiver", 80)
    rate = _receive(two_nodes, "default", two_nodes.pod_ip("sender"), 5_000_000)
    assert rate == pytest.approx(80, rel=0.2)


def test_twice_leaves_nothing(leftovers: Leftovers, host_state: HostState) -> None:
    """Two runs, each with a pod, leave the machine as it was."""
    before = host_state()
    for _ in range(2):
        with start(ClusterSpec(nodes=1)) as one:
            _run_ready(one, "default", _pod("a", "sleep", "600"))
            assert leftovers(one.own) != []
        assert leftovers(one.own) == []
    assert host_state() == before


@pytest.mark.parametrize("moment", ["starting", "ready"])
def test_killed_owner_leaves_nothing(
    owner: Callable[[int], Owner], leftovers: Leftovers, host_state: HostState, moment: str
) -> None:
    """SIGKILL of the owner's whole process group ends its node, while it starts too."""
    before = host_state()
    one = owner(1)
    layout = one.layout(1)
    if moment == "ready":
        one.wait_ready()
    else:
        time.sleep(2.0)
    assert cleanup.cgroup_folders(layout.name) != []
    os.killpg(one.process.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while layout.run_dir.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert leftovers(layout) == []
    assert host_state() == before


def test_killed_guard_is_swept(leftovers: Leftovers, host_state: HostState) -> None:
    """SIGKILL of the guard ends all processes at once; the rest goes with the next sweep."""
    before = host_state()
    one = start(ClusterSpec(nodes=1))
    assert one.guard is not None
    one.guard.kill()
    one.guard.wait()
    deadline_s = time.monotonic() + 20
    while any(found.startswith("process") for found in leftovers(one.own)):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert slots.sweep_dead(cleanup.sweep) >= 1
    assert leftovers(one.own) == []
    assert host_state() == before
