"""Short requests to an API server through ``kubectl proxy``, some as a controller or kubelet would make them."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx

import samples
from kvserve_api.canonical import canonical_json, short_digest
from kvserve_api.names import (
    ANNOTATION_DIGEST,
    ANNOTATION_INPUTS,
    LABEL_ARTIFACT,
    LABEL_POLICY,
    LABEL_RUN,
)
from kvserve_api.profile_set import ParetoSet
from kvserve_api.progress import Progress
from testcluster.cluster import Cluster

T = TypeVar("T")

PLURALS = {
    "kvp": "apis/kvserve.io/v1alpha1/namespaces/{}/kvservepolicies",
    "jobs": "apis/batch/v1/namespaces/{}/jobs",
    "configmaps": "api/v1/namespaces/{}/configmaps",
    "pods": "api/v1/namespaces/{}/pods",
    "leases": "apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "resourcequotas": "api/v1/namespaces/{}/resourcequotas",
    "events": "api/v1/namespaces/{}/events",
    "serviceaccounts": "api/v1/namespaces/{}/serviceaccounts",
    "roles": "apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
}
CHILDREN = ("jobs", "configmaps", "serviceaccounts", "roles", "rolebindings")
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"


@contextlib.contextmanager
def kubectl_proxy(cluster: Cluster) -> Iterator[str]:
    """Run ``kubectl proxy`` on a free port of loopback and yield its address."""
    process = subprocess.Popen(
        ["kubectl", "proxy", "--port=0"],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"(127\.0\.0\.1:\d+)", line)
        assert found, line
        yield f"http://{found.group(1)}"
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def eventually(check: Callable[[], T | None], what: str = "it", *, timeout_s: float = 20.0) -> T:
    """Return what the check returns, as soon as that is something."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s: {value!r}"
        time.sleep(0.05)


class Api:
    """One namespace of an API server, as administrator.

    Attributes:
        namespace: The namespace.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self.namespace = namespace
        self._http = httpx.Client(base_url=url, timeout=20, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self, method: str, plural: str, name: str = "", *, content_type: str = "", **options: Any
    ) -> httpx.Response:
        """Make a request about a collection, or an object of it (``name`` or ``name/status``)."""
        path = "/" + PLURALS[plural].format(self.namespace) + (f"/{name}" if name else "")
        headers = {"Content-Type": content_type} if content_type else {}
        return self._http.request(method, path, headers=headers, **options)

    def get(self, plural: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None if there is none."""
        response = self.request("GET", plural, name)
        return None if response.status_code == 404 else _value(response)

    def find(self, plural: str, selector: str = "") -> list[dict[str, Any]]:
        """Return the objects of a collection."""
        params = {"labelSelector": selector} if selector else {}
        items: list[dict[str, Any]] = _value(self.request("GET", plural, params=params))["items"]
        return items

    def create(self, plural: str, value: dict[str, Any]) -> dict[str, Any]:
        """Create an object."""
        return _value(self.request("POST", plural, json=value))

    def patch(self, plural: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Merge a patch into an object (``name``) or its status (``name/status``)."""
        response = self.request("PATCH", plural, name, content_type=MERGE, json=value)
        return _value(response)

    def delete(self, plural: str, name: str) -> None:
        """Delete an object in the background."""
        response = self.request("DELETE", plural, name, json={"propagationPolicy": "Background"})
        assert response.status_code in (200, 202, 404), response.text

    def policy(self, name: str, **spec: Any) -> dict[str, Any]:
        """Create a policy of samples."""
        return self.create("kvp", samples.policy_object(name, namespace=self.namespace, **spec))

    def condition(self, policy: str, kind: str) -> tuple[str, str, str]:
        """Return status, reason and message of a condition; empty strings if it is not there."""
        value = self.get("kvp", policy) or {}
        for condition in (value.get("status") or {}).get("conditions") or []:
            if condition["type"] == kind:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def wait_reason(
        self, policy: str, kind: str, reason: str, *, timeout_s: float = 20.0
    ) -> tuple[str, str]:
        """Wait until a condition carries a reason; return its status and message."""

        def check() -> tuple[str, str] | None:
            status, found, message = self.condition(policy, kind)
            return (status, message) if found == reason else None

        return eventually(check, f"{policy} {kind} {reason}", timeout_s=timeout_s)

    def wait_job(self, policy: str, *, other_than: str = "") -> dict[str, Any]:
        """Wait for a policy's Job and return it."""

        def check() -> dict[str, Any] | None:
            jobs = self.find("jobs", f"{LABEL_POLICY}={policy}")
            fresh = [j for j in jobs if j["metadata"]["name"] != other_than]
            return fresh[0] if fresh else None

        return eventually(check, f"Job of {policy}")

    def children(self, policy: str) -> list[str]:
        """Return kind and name of all children of a policy."""
        return sorted(
            f"{plural}/{item['metadata']['name']}"
            for plural in CHILDREN
            for item in self.find(plural, f"{LABEL_POLICY}={policy}")
        )

    def write_progress(self, job: dict[str, Any], progress: Progress) -> None:
        """Do what the profiler does to tell of progress."""
        name = job["metadata"]["name"].replace("-job-", "-run-")
        data = {"progress.json": canonical_json(progress.to_json()).decode()}
        self.patch("configmaps", name, {"data": data})

    def write_set(self, job: dict[str, Any], pareto: ParetoSet, **changes: Any) -> str:
        """Do what the profiler does at its end: write the Pareto ConfigMap; return its name."""
        metadata = job["metadata"]
        inputs = metadata["annotations"][ANNOTATION_INPUTS]
        name = str(metadata["name"]).replace("-job-", "-pareto-")
        value = {
            "metadata": {
                "name": name,
                "labels": {
                    LABEL_POLICY: metadata["labels"][LABEL_POLICY],
                    LABEL_ARTIFACT: "pareto",
                    LABEL_RUN: short_digest(inputs),
                },
                "annotations": {ANNOTATION_DIGEST: pareto.digest, ANNOTATION_INPUTS: inputs},
                "ownerReferences": metadata["ownerReferences"],
            },
            "immutable": True,
            "data": {"pareto.json": pareto.canonical().decode()},
        } | changes
        self.create("configmaps", value)
        return name

    def wait_pod(self, job: str) -> dict[str, Any]:
        """Wait for the pod that the Job controller makes and return it."""
        selector = f"batch.kubernetes.io/job-name={job}"
        return eventually(lambda: next(iter(self.find("pods", selector)), None), f"pod of {job}")

    def end_pod(self, job: str, *, code: int, reason: str = "Error", message: str = "") -> None:
        """Do what a kubelet does when the profiler's container ends."""
        name = self.wait_pod(job)["metadata"]["name"]
        ended = {"exitCode": code, "reason": reason, "message": message}
        status = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [
                {
                    "name": "profiler",
                    "image": "x",
                    "imageID": "x",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"terminated": ended},
                }
            ],
        }
        self.patch("pods", f"{name}/status", {"status": status})

    def run_pod(self, name: str, labels: dict[str, str]) -> None:
        """Create a pod that no node runs."""
        harmless = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        spec = {
            "containers": [{"name": "c", "image": "none", "securityContext": harmless}],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        }
        self.create("pods", {"metadata": {"name": name, "labels": labels}, "spec": spec})

    def report(self, policy: str, *, synced: int) -> None:
        """Do what the controller does: report the policy programmed and pods synced."""
        roles = ("Prefill", "Decode")
        status = {
            "conditions": [
                {
                    "type": "Programmed",
                    "status": "True",
                    "reason": "Acknowledged",
                    "message": "all pods hold the latest table",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ],
            "targets": [{"role": role, "connected": synced, "synced": synced} for role in roles],
        }
        self.apply_status(policy, status)

    def apply_status(self, policy: str, status: dict[str, Any]) -> None:
        """Write the controller's part of a policy's status."""
        value = {"apiVersion": "kvserve.io/v1alpha1", "kind": "KVServePolicy", "status": status}
        response = self.request(
            "PATCH",
            "kvp",
            f"{policy}/status",
            content_type=APPLY,
            params={"fieldManager": "kvserve-controller", "force": "true"},
            json=value | {"metadata": {"name": policy}},
        )
        _value(response)


def _value(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code < 300, response.text
    value: dict[str, Any] = response.json()
    return value
