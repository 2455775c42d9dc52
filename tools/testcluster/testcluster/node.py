"""containerd, kubelet, kube-proxy, scheduler and CoreDNS: configuration, start and readiness."""

import functools
import json
import string
import time
from pathlib import Path

from testcluster import controlplane, images, network
from testcluster.controlplane import AdminClient, Credentials, write_kubeconfig
from testcluster.errors import ClusterError
from testcluster.layout import Layout
from testcluster.process import Components, run

_READY_TIMEOUT_S = 60.0
_PLUGINS = "/usr/lib/cni"


def start_cluster(layout: Layout, bin_dir: Path, components: Components, host_network: str) -> None:
    """Start control plane and nodes inside this process's namespaces; wait until all is ready.

    Raises:
        ClusterError: Something failed or was not ready in time.
    """
    network.hide_host_folders(layout)
    network.connect(layout, host_network)
    _write_cni(layout)
    for index in range(layout.nodes):
        network.create_cgroups(layout.node_name(index))
        _start_containerd(layout, index, components)
    credentials = controlplane.issue_credentials(layout)
    client = controlplane.start_control_plane(layout, bin_dir, credentials, components)
    _load_images(layout, bin_dir, components)
    for index in range(layout.nodes):
        _start_kubelet(layout, index, bin_dir, credentials, components)
    _start_scheduler_and_proxy(layout, bin_dir, credentials, components)
    _apply_coredns(layout, bin_dir)
    for index in range(layout.nodes):
        name = layout.node_name(index)
        ready = functools.partial(_is_node_ready, client, name)
        components.wait(f"node {name}", ready, _READY_TIMEOUT_S)
    components.wait("CoreDNS", lambda: _is_dns_ready(client), _READY_TIMEOUT_S)


def containerd_socket(layout: Layout, index: int) -> Path:
    """Return the path of a node's containerd socket; it works from the host too."""
    return layout.node_dir(index) / "containerd.sock"


def import_archive(layout: Layout, archive: Path) -> None:
    """Import a docker-archive into all nodes.

    Raises:
        ClusterError: It is not one.
    """
    for index in range(layout.nodes):
        socket = str(containerd_socket(layout, index))
        run("ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", str(archive))


def containerd_config(layout: Layout, index: int) -> str:
    """Return containerd's configuration (TOML, version 2) for one node."""
    folder = layout.node_dir(index)
    return f"""\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{containerd_socket(layout, index)}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE_IMAGE}"
  # root of a virtual machine or container may lack CAP_SYS_RESOURCE
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_PLUGINS}"
    conf_dir = "{layout.run_dir}/cni-config"
"""


def cni_config(layout: Layout) -> dict[str, object]:
    """Return the network of all pods: one bridge, one range of addresses for all nodes."""
    addresses = {
        "subnet": layout.bridge_subnet,
        "rangeStart": f"{layout.subnet_prefix}.1.1",
        "gateway": layout.node_ip(0),
    }
    bridge = {
        "type": "bridge",
        "bridge": network.BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[addresses]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(layout.run_dir / "ipam"),
        },
    }
    return {"cniVersion": "0.4.0", "name": layout.name, "plugins": [bridge]}


def kubelet_config(layout: Layout, index: int, credentials: Credentials) -> dict[str, object]:
    """Return a kubelet's configuration; callers need a certificate or token and a right."""
    folder, name, ip = layout.node_dir(index), layout.node_name(index), layout.node_ip(index)
    server = credentials.authority.issue(f"{name}-server", name, hosts=(name, ip))
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": ip,
        "healthzBindAddress": ip,
        "tlsCertFile": str(server.certificate),
        "tlsPrivateKeyFile": str(server.key),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(credentials.authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "containerRuntimeEndpoint": f"unix://{containerd_socket(layout, index)}",
        "clusterDNS": [layout.dns_ip],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "podLogsDir": str(layout.log_dir / "pods" / name),
        "volumePluginDir": str(folder / "volume-plugins"),
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
        "nodeStatusUpdateFrequency": "2s",
    }


def _write_cni(layout: Layout) -> None:
    """Write the pods' network where containerd reads it."""
    folder = layout.run_dir / "cni-config"
    folder.mkdir()
    (folder / "10-bridge.conflist").write_text(json.dumps(cni_config(layout)))


def _start_containerd(layout: Layout, index: int, components: Components) -> None:
    """Start a node's container runtime."""
    folder = layout.node_dir(index)
    folder.mkdir()
    path = folder / "containerd.toml"
    path.write_text(containerd_config(layout, index))
    name = layout.node_name(index)
    components.start(f"containerd-{name}", ["containerd", "--config", str(path)])


def _load_images(layout: Layout, bin_dir: Path, components: Components) -> None:
    """Import the cluster's own images once the runtimes listen."""
    for index in range(layout.nodes):
        components.wait("containerd", containerd_socket(layout, index).exists, _READY_TIMEOUT_S)
    for image in images.cluster_images(bin_dir):
        archive = layout.run_dir / "image.tar"
        images.write_archive(image, archive)
        import_archive(layout, archive)
        archive.unlink()


def _start_kubelet(
    layout: Layout, index: int, bin_dir: Path, credentials: Credentials, components: Components
) -> None:
    """Start a node's kubelet."""
    folder, name = layout.node_dir(index), layout.node_name(index)
    config = folder / "kubelet.json"
    config.write_text(json.dumps(kubelet_config(layout, index, credentials)))
    kubeconfig = write_kubeconfig(
        folder / f"{name}.kubeconfig",
        layout,
        credentials.authority,
        f"system:node:{name}",
        group="system:nodes",
    )
    command = [
        str(bin_dir / "kubelet"),
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={folder / 'kubelet'}",
        f"--cert-dir={folder / 'pki'}",
        f"--hostname-override={name}",
        f"--node-ip={layout.node_ip(index)}",
    ]
    components.start(f"kubelet-{name}", command)


def _start_scheduler_and_proxy(
    layout: Layout, bin_dir: Path, credentials: Credentials, components: Components
) -> None:
    """Start the scheduler, and one proxy: all nodes share a network namespace."""
    scheduler = write_kubeconfig(
        layout.run_dir / "scheduler.kubeconfig",
        layout,
        credentials.authority,
        "system:kube-scheduler",
    )
    components.start(
        "scheduler",
        [str(bin_dir / "kube-scheduler"), f"--kubeconfig={scheduler}", "--leader-elect=false"],
    )
    proxy = write_kubeconfig(
        layout.run_dir / "proxy.kubeconfig", layout, credentials.authority, "system:kube-proxy"
    )
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(proxy)},
        "clusterCIDR": layout.bridge_subnet,
        "hostnameOverride": layout.node_name(0),
        "conntrack": {"maxPerCore": 0},
    }
    path = layout.run_dir / "proxy.json"
    path.write_text(json.dumps(config))
    components.start("proxy", [str(bin_dir / "kube-proxy"), f"--config={path}"])


def _apply_coredns(layout: Layout, bin_dir: Path) -> None:
    """Create the cluster's name server."""
    template = string.Template((Path(__file__).parent / "coredns.yaml").read_text())
    manifest = template.substitute(IMAGE=images.COREDNS_IMAGE, CLUSTER_IP=layout.dns_ip)
    kubectl = (str(bin_dir / "kubectl"), f"--kubeconfig={layout.kubeconfig}")
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            run(*kubectl, "apply", "--server-side", "-f", "-", stdin=manifest)
        except ClusterError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)
        else:
            return


def _is_node_ready(client: AdminClient, name: str) -> bool:
    """Return whether a node says that it is ready."""
    body = client.get(f"/api/v1/nodes/{name}")
    conditions = json.loads(body)["status"].get("conditions", []) if body else []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _is_dns_ready(client: AdminClient) -> bool:
    """Return whether the name server answers."""
    body = client.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns")
    return bool(body) and json.loads(body or "{}")["status"].get("readyReplicas", 0) > 0
