"""The example `examples/01-chat` on a cluster: its manifests, its model, and waiting for its pods."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from testcluster import hostpods
from testcluster.cluster import Cluster

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEPLOYMENTS = ("chat-prefill", "chat-decode", "chat-router")
EXAMPLE = Path("examples") / "01-chat"
CHART_VALUES: dict[str, Any] = {
    "artifacts": {
        "url": "file:///artifacts",
        "volume": {"persistentVolumeClaim": {"claimName": "chat-artifacts"}},
    }
}
"""What the example's README sets of the chart."""


def convert_model(root: Path) -> Path:
    """Return the folder of the converted model; made at the first call, then cached outside the clone.

    Raises:
        RuntimeError: The package index could not be reached, or the conversion failed.
    """
    script = root / "tools" / "models" / "smollm2.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"converting the model failed: {done.stderr.strip()[-2000:]}")
    return Path(done.stdout.strip().splitlines()[-1])


def volumes(model: Path, artifacts: Path, namespace: str) -> list[dict[str, Any]]:
    """Return PersistentVolumes with folders of this machine, bound to the example's claims.

    Args:
        model: The model's folder.
        artifacts: Where the profiling Job puts calibration bundles; made, and opened to the Job's user.
        namespace: Where the claims are.
    """
    artifacts.mkdir(parents=True, exist_ok=True)
    # a folder of the host keeps its owner, whatever the pod's fsGroup
    artifacts.chmod(0o777)
    return [
        _volume("chat-model", model, namespace),
        _volume("chat-artifacts", artifacts, namespace),
    ]


def _volume(claim: str, folder: Path, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{claim}-{namespace}"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "hostPath": {"path": str(folder), "type": "Directory"},
            "claimRef": {"namespace": namespace, "name": claim},
        },
    }


def manifests(root: Path, name: str, *, on_host: bool) -> list[dict[str, Any]]:
    """Return the objects of one of the example's files.

    Args:
        root: The clone.
        name: The file's name.
        on_host: Run our images' containers from this machine's environment instead.
    """
    objects: list[dict[str, Any]] = [
        item for item in yaml.safe_load_all((root / EXAMPLE / name).read_text()) if item
    ]
    for item in objects:
        if on_host and item["kind"] in ("Deployment", "Job"):
            template = item["spec"]["template"]
            template["spec"] = hostpods.hostify(template["spec"])
            for container in template["spec"]["containers"]:
                if container["command"][0] == "python3":
                    # the host's own python3 knows nothing of the environment
                    container["command"][0] = sys.executable
    return objects


def send_telemetry(objects: list[dict[str, Any]], endpoint: str) -> None:
    """Make the Deployments' containers send traces and metrics to an OTLP/HTTP endpoint."""
    for item in objects:
        if item["kind"] == "Deployment":
            name = item["metadata"]["name"]
            for container in item["spec"]["template"]["spec"]["containers"]:
                container["env"] += [
                    {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": endpoint},
                    {"name": "OTEL_SERVICE_NAME", "value": name},
                    {"name": "OTEL_METRIC_EXPORT_INTERVAL", "value": "2000"},
                ]


def apply(cluster: Cluster, objects: list[dict[str, Any]], namespace: str) -> None:
    """Apply objects by server-side apply."""
    document = yaml.safe_dump_all(objects)
    cluster.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", input=document)


def wait_ready(
    cluster: Cluster, namespace: str, *, timeout_s: float, tell: Callable[[str], None]
) -> None:
    """Wait until all Deployments of the example are available.

    Args:
        cluster: Where they are.
        namespace: Their namespace.
        timeout_s: How long to wait.
        tell: Called with a line on how far they are.

    Raises:
        TimeoutError: They were not available in time; the error holds what kubectl says of their pods.
    """
    start_s = time.monotonic()
    while True:
        template = "{range .items[*]}{.metadata.name}={.status.availableReplicas} {end}"
        line = cluster.kubectl("get", "deployments", "-n", namespace, "-o", f"jsonpath={template}")
        states = dict(item.partition("=")[::2] for item in line.split())
        waiting = [name for name in DEPLOYMENTS if states.get(name) != "1"]
        waited_s = time.monotonic() - start_s
        tell(f"waiting for {', '.join(waiting)} ({waited_s:.0f} s)" if waiting else "all are ready")
        if not waiting:
            return
        if waited_s > timeout_s:
            pods = cluster.kubectl("get", "pods", "-n", namespace, "-o", "wide")
            raise TimeoutError(f"{', '.join(waiting)} not available in {timeout_s:.0f} s:\n{pods}")
        time.sleep(1.0)


def pod(cluster: Cluster, app: str, namespace: str) -> str:
    """Return the name of the one running pod of an app."""
    selector = f"app.kubernetes.io/name={app}"
    names = cluster.kubectl(
        "get", "pods", "-n", namespace, "-l", selector, "-o", "jsonpath={.items[*].metadata.name}"
    ).split()
    if len(names) != 1:
        raise RuntimeError(f"expected one pod of {app}, found {names}")
    return names[0]
