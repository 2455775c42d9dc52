"""How the process starts: without a CRD, without permissions, over TLS, and what it tells of itself."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import kube_api
from kube_api import Api, eventually
from operator_gate import Gate
from operator_process import ROOT, Operator, launch
from otlp_receiver import Receiver
from testcluster.cluster import Cluster

StartOperator = Callable[..., Operator]


@pytest.mark.slow
def test_over_tls_for_the_whole_cluster(fresh_control_plane: Cluster, tmp_path: Path) -> None:
    """Without the CRD the operator waits and is not ready; with it, it serves every namespace, over TLS."""
    cluster = fresh_control_plane
    operator = launch(cluster, None, "", tmp_path, "profiler:1")
    eventually(lambda: "is not served: apply crds/" in operator.log.read_text(), "the advice")
    assert httpx.get(f"{operator.health}/readyz", trust_env=False).status_code == 503
    assert httpx.get(f"{operator.health}/healthz", trust_env=False).status_code == 200
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/kvservepolicies.yaml"))
    operator.wait_ready()
    for namespace in ("one", "two"):
        cluster.kubectl("create", "namespace", namespace)
    with kube_api.kubectl_proxy(cluster) as url:
        for namespace in ("one", "two"):
            api = Api(url, namespace)
            api.policy("chat")
            api.wait_reason("chat", "Profiled", "Profiling")
            api.close()
    operator.end()
    assert operator.process.returncode == 0


def test_without_permissions_it_waits(
    alone: Api, proxy: str, control_plane: Cluster, tmp_path: Path
) -> None:
    """Without permissions the operator says which it misses and where they are listed, and does not end."""
    gate = Gate(upstream=proxy, user=f"system:serviceaccount:{alone.namespace}:nobody")
    gate.start()
    operator = launch(control_plane, gate, alone.namespace, tmp_path, "profiler:1")
    eventually(lambda: "Permissions" in operator.log.read_text(), "the advice")
    text = operator.log.read_text()
    assert 'cannot list resource "kvservepolicies"' in text
    assert operator.process.poll() is None
    operator.end()
    assert operator.process.returncode == 0
    gate.stop()


def test_without_credentials_it_says_so(tmp_path: Path, control_plane: Cluster) -> None:
    """A kubeconfig that makes no sense ends the process with one line."""
    (tmp_path / "operator.yaml").write_text(json.dumps({"profiler": {"image": "i"}}))
    (tmp_path / "kubeconfig").write_text("current-context: nowhere\n")
    operator = launch(control_plane, None, "", tmp_path, "i", kubeconfig=tmp_path / "kubeconfig")
    assert operator.process.wait(20) == 64
    assert "error: KUBECONFIG" in operator.log.read_text()
    assert "Traceback" not in operator.log.read_text()


def test_it_tells_of_itself(alone: Api, start_operator: StartOperator) -> None:
    """Reconciliations are spans, and reconciliations and writes are counted, for a real OTLP receiver."""
    with Receiver() as receiver:
        operator = start_operator(
            alone.namespace, environ={"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        )
        alone.policy("chat")
        job = alone.wait_job("chat")
        alone.wait_reason("chat", "Profiled", "Profiling")
        operator.end()
    spans = [s for s in receiver.spans if s.name == "kvserve.operator.reconcile"]
    assert spans
    assert {s.service for s in spans} == {"kvserve-operator"}
    assert spans[0].attributes["kvserve.policy"] == f"{alone.namespace}/chat"
    writes = {
        p.attributes["kvserve.kind"]: p.value
        for p in receiver.points
        if p.name == "kvserve.operator.writes"
    }
    assert writes["Job"] == 1
    assert {p.attributes["kvserve.outcome"] for p in receiver.points if "reconciles" in p.name} == {
        "ok"
    }
    # the Job sends its own telemetry to the same place
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": receiver.endpoint} in env
