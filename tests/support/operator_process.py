"""Starting and stopping real operator processes behind a gate."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

import kube_api
from operator_gate import Gate
from testcluster.cluster import Cluster

ROOT = Path(__file__).parents[2]
ACCOUNT = "kvserve-operator"


@dataclass(slots=True)
class Operator:
    """An operator process.

    Attributes:
        process: The process.
        gate_or_none: What it talks through, if it is not the API server itself.
        log: Its output.
        health: Address of its health endpoint.
    """

    process: subprocess.Popen[bytes]
    gate_or_none: Gate | None
    log: Path
    health: str

    @property
    def gate(self) -> Gate:
        """What it talks through."""
        assert self.gate_or_none is not None
        return self.gate_or_none

    def wait_ready(self) -> None:
        """Wait until it says that it is ready."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"{self.health}/readyz", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        kube_api.eventually(ready, "readiness")

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(15)


def documented_rules() -> tuple[list[Any], list[Any]]:
    """Return the permissions that ``docs/operations.md`` lists: in served namespaces, and in the operator's own."""
    text = (ROOT / "docs/operations.md").read_text().split("### Permissions")[1]
    served, own = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    return yaml.safe_load(served), yaml.safe_load(own)


def grant(cluster: Cluster, namespace: str) -> str:
    """Give a service account of the namespace what an operator needs; return its user name."""
    served, own = documented_rules()
    metadata = {"name": ACCOUNT, "namespace": namespace}
    subject = {"kind": "ServiceAccount", **metadata}
    rbac = "rbac.authorization.k8s.io"
    reference = {"apiGroup": rbac, "kind": "Role", "name": ACCOUNT}
    objects = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": served + own,
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": reference,
            "subjects": [subject],
        },
    ]
    manifest = {"apiVersion": "v1", "kind": "List", "items": objects}
    cluster.kubectl("apply", "-f", "-", input=json.dumps(manifest))
    return f"system:serviceaccount:{namespace}:{ACCOUNT}"


def launch(
    cluster: Cluster,
    gate: Gate | None,
    namespace: str,
    folder: Path,
    image: str,
    *,
    kubeconfig: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Operator:
    """Start an operator.

    Args:
        cluster: What it serves.
        gate: What it talks through; None for the cluster itself, as administrator.
        namespace: The namespace it serves; empty for all.
        folder: For its files.
        image: The profiler's image.
        kubeconfig: Its credentials instead of the administrator's.
        environ: Further variables.
    """
    (folder / "operator.yaml").write_text(json.dumps({"profiler": {"image": image}}))
    kubeconfig = kubeconfig or cluster.kubeconfig
    if gate:
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(json.dumps(_kubeconfig(gate.url)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "kvserve_operator", "--health", address]
    command += ["--config", str(folder / "operator.yaml")]
    command += ["--lease-namespace", namespace or "default"]
    command += ["--namespace", namespace] if namespace else []
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**cluster.env, **(environ or {}), "KUBECONFIG": str(kubeconfig)},
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    return Operator(process=process, gate_or_none=gate, log=log, health=f"http://{address}")


def _kubeconfig(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
