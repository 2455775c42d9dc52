"""etcd, API server and controller manager: their certificates, flags and readiness."""

import base64
import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from testcluster.layout import Layout
from testcluster.pki import Authority, Pair, write_signing_pair
from testcluster.process import Components

_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What the control plane's programs need to trust each other.

    Attributes:
        authority: Signs users, nodes and the API server.
        etcd: etcd's server certificate, by an authority of its own.
        etcd_client: The API server's certificate towards etcd.
        etcd_authority: Path of that authority's certificate.
        server: The API server's certificate.
        kubelet_client: The API server's certificate towards kubelets.
        signing_key: Signs service-account tokens.
        signing_public_key: Verifies them.
    """

    authority: Authority
    etcd: Pair
    etcd_client: Pair
    etcd_authority: Path
    server: Pair
    kubelet_client: Pair
    signing_key: Path
    signing_public_key: Path


def issue_credentials(layout: Layout) -> Credentials:
    """Create the authorities and the control plane's certificates below ``pki``."""
    folder = layout.pki_dir
    folder.mkdir(mode=0o700)
    authority = Authority(folder, "ca")
    etcd_authority = Authority(folder, "etcd-ca")
    service = "kubernetes.default.svc"
    hosts = (
        "kubernetes",
        "kubernetes.default",
        service,
        f"{service}.cluster.local",
        "localhost",
        "127.0.0.1",
        layout.kubernetes_ip,
        layout.node_ip(0),
    )
    signing_key, signing_public_key = write_signing_pair(folder)
    return Credentials(
        authority=authority,
        etcd=etcd_authority.issue("etcd", "etcd", hosts=("localhost", "127.0.0.1")),
        etcd_client=etcd_authority.issue("etcd-client", "kube-apiserver"),
        etcd_authority=etcd_authority.certificate,
        server=authority.issue("apiserver", "kube-apiserver", hosts=hosts),
        kubelet_client=authority.issue(
            "apiserver-kubelet", "kube-apiserver-kubelet-client", group="system:masters"
        ),
        signing_key=signing_key,
        signing_public_key=signing_public_key,
    )


def write_kubeconfig(
    path: Path,
    layout: Layout,
    authority: Authority,
    user: str,
    group: str | None = None,
) -> Path:
    """Write a configuration for one user, complete in itself; return its path."""
    pair = authority.issue(path.stem, user, group=group)
    cluster = {
        "server": layout.api_url,
        "certificate-authority-data": _base64(authority.certificate),
    }
    client = {
        "client-certificate-data": _base64(pair.certificate),
        "client-key-data": _base64(pair.key),
    }
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": layout.name, "cluster": cluster}],
        "users": [{"name": user, "user": client}],
        "contexts": [{"name": layout.name, "context": {"cluster": layout.name, "user": user}}],
        "current-context": layout.name,
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return path


def etcd_command(layout: Layout, bin_dir: Path, credentials: Credentials) -> list[str]:
    """Return etcd's command line; it listens on loopback and keeps its data in the run folder."""
    _, client_port, peer_port = layout.ports
    client, peer = f"https://127.0.0.1:{client_port}", f"https://127.0.0.1:{peer_port}"
    pair, authority = credentials.etcd, credentials.etcd_authority
    return [
        str(bin_dir / "etcd"),
        f"--data-dir={layout.run_dir / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        f"--cert-file={pair.certificate}",
        f"--key-file={pair.key}",
        f"--trusted-ca-file={authority}",
        "--client-cert-auth",
        f"--peer-cert-file={pair.certificate}",
        f"--peer-key-file={pair.key}",
        f"--peer-trusted-ca-file={authority}",
        "--peer-client-cert-auth",
        "--unsafe-no-fsync",
    ]


def apiserver_command(layout: Layout, bin_dir: Path, credentials: Credentials) -> list[str]:
    """Return the API server's command line."""
    port, etcd_port, _ = layout.ports
    if layout.nodes:
        # every service's address is inside the instance's namespaces
        reach = ["--bind-address=0.0.0.0", f"--advertise-address={layout.api_ip}"]
    else:
        # a loopback address cannot be an endpoint, and nothing looks for one without a node
        reach = [
            "--bind-address=127.0.0.1",
            f"--advertise-address={layout.node_ip(0)}",
            "--endpoint-reconciler-type=none",
        ]
    return [
        str(bin_dir / "kube-apiserver"),
        *reach,
        f"--secure-port={port}",
        f"--etcd-servers=https://127.0.0.1:{etcd_port}",
        f"--etcd-cafile={credentials.etcd_authority}",
        f"--etcd-certfile={credentials.etcd_client.certificate}",
        f"--etcd-keyfile={credentials.etcd_client.key}",
        f"--client-ca-file={credentials.authority.certificate}",
        f"--tls-cert-file={credentials.server.certificate}",
        f"--tls-private-key-file={credentials.server.key}",
        f"--kubelet-certificate-authority={credentials.authority.certificate}",
        f"--kubelet-client-certificate={credentials.kubelet_client.certificate}",
        f"--kubelet-client-key={credentials.kubelet_client.key}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={credentials.signing_public_key}",
        f"--service-account-signing-key-file={credentials.signing_key}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-cluster-ip-range={layout.service_subnet}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
    ]


def controller_manager_command(
    layout: Layout, bin_dir: Path, credentials: Credentials
) -> list[str]:
    """Return the controller manager's command line; it serves no port."""
    user = "system:kube-controller-manager"
    path = layout.run_dir / "controller-manager.kubeconfig"
    return [
        str(bin_dir / "kube-controller-manager"),
        f"--kubeconfig={write_kubeconfig(path, layout, credentials.authority, user)}",
        "--secure-port=0",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        "--kube-api-qps=1000",  # at the default of 20 its controllers need 4 s to begin
        "--kube-api-burst=2000",
        f"--service-account-private-key-file={credentials.signing_key}",
        f"--root-ca-file={credentials.authority.certificate}",
    ]


class AdminClient:
    """Asks the API server simple questions as administrator, with the standard library."""

    def __init__(self, layout: Layout, authority: Authority) -> None:
        self._host = urlsplit(layout.api_url).hostname or ""
        self._port = layout.ports[0]
        self._context = ssl.create_default_context(cafile=str(authority.certificate))
        self._context.load_cert_chain(layout.pki_dir / "admin.crt", layout.pki_dir / "admin.key")

    def get(self, path: str) -> bytes | None:
        """Return the body of a GET, or None where it fails in any way."""
        connection = http.client.HTTPSConnection(
            self._host, self._port, context=self._context, timeout=2
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return body if response.status == http.HTTPStatus.OK else None


def start_control_plane(
    layout: Layout, bin_dir: Path, credentials: Credentials, components: Components
) -> AdminClient:
    """Start the three programs and wait until a pod could be created.

    Returns:
        The administrator's client.

    Raises:
        ClusterError: A program ended or was not ready in time.
    """
    write_kubeconfig(
        layout.kubeconfig, layout, credentials.authority, "admin", group="system:masters"
    )
    client = AdminClient(layout, credentials.authority)
    components.start("etcd", etcd_command(layout, bin_dir, credentials))
    # without this the API server meets a closed port and sleeps for a second
    components.wait("etcd", lambda: _accepts(layout.ports[1]), _READY_TIMEOUT_S)
    components.start("apiserver", apiserver_command(layout, bin_dir, credentials))
    manager = controller_manager_command(layout, bin_dir, credentials)
    components.wait("API server", lambda: client.get("/readyz") is not None, _READY_TIMEOUT_S)
    components.start("controller-manager", manager)
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    components.wait("controller manager", lambda: client.get(account) is not None, _READY_TIMEOUT_S)
    return client


def _accepts(port: int) -> bool:
    """Return whether something listens on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _base64(path: Path) -> str:
    """Return a file's content as base64."""
    return base64.b64encode(path.read_bytes()).decode()
