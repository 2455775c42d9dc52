"""The controller on a real API server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvserve_api.names import ANNOTATION_DIGEST, LABEL_ARTIFACT
from kvserve_controller.cluster import ClusterSource
from kvserve_controller.kube_client import KubeClient
from kvserve_controller.kube_status import StatusWriter
from kvserve_controller.kubeconfig import Access
from kvserve_controller.program import Instant
from kvserve_controller.source import Entry, Snapshot
from podclient import PodClient, transfer_report, until
from samples import INT4, RAW, pareto, policy_object
from testcluster import Cluster

Process = Any
CRD = Path(__file__).parents[2] / "crds" / "kvservepolicies.yaml"
RBAC = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: controller}
rules:
- {apiGroups: [kvserve.io], resources: [kvservepolicies], verbs: [get, list, watch]}
- {apiGroups: [kvserve.io], resources: [kvservepolicies/status], verbs: [patch]}
- {apiGroups: [""], resources: [configmaps], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: controller}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: controller}
subjects: [{kind: ServiceAccount, name: controller}]
"""


class World:
    """A namespace with the CRD, a policy, and a hand that does what the operator would."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.key = f"{namespace}/chat"

    def kubectl(self, *arguments: str, document: Any = None) -> str:
        """Run kubectl in the namespace."""
        text = yaml.safe_dump(document) if document is not None else None
        return str(self.cluster.kubectl("-n", self.namespace, *arguments, input=text))

    def policy(self, **spec: Any) -> None:
        """Apply the policy."""
        self.kubectl("apply", "-f", "-", document=policy_object(namespace=self.namespace, **spec))

    def set(self, name: str = "set-1", *, digest: str = "", **arguments: Any) -> None:
        """Publish a Pareto set and put it in force, as Job and operator do."""
        set_ = pareto(*arguments.pop("profiles", ()), **arguments)
        self.kubectl(
            "create",
            "-f",
            "-",
            document={
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": name,
                    "labels": {LABEL_ARTIFACT: "pareto"},
                    "annotations": {ANNOTATION_DIGEST: digest or set_.digest},
                },
                "data": {"pareto.json": set_.canonical().decode()},
            },
        )
        self.operator_status(
            pareto={
                "configMapRef": {"name": name},
                "digest": digest or set_.digest,
                "profiles": len(set_.profiles("default")),
            },
            targets=[{"role": "Decode", "desired": 1}, {"role": "Prefill", "desired": 1}],
            conditions=[
                {
                    "type": "Accepted",
                    "status": "True",
                    "reason": "Accepted",
                    "message": "",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ],
        )

    def operator_status(self, **status: Any) -> None:
        """Apply status fields as the operator."""
        head = {
            "apiVersion": "kvserve.io/v1alpha1",
            "kind": "KVServePolicy",
            "metadata": {"name": "chat", "namespace": self.namespace},
        }
        self.kubectl(
            *("apply", "--server-side", "--subresource=status"),
            *("--field-manager=kvserve-operator", "-f", "-"),
            document=head | {"status": status},
        )

    def get(self) -> Any:
        """Return the policy object."""
        return json.loads(self.kubectl("get", "kvp", "chat", "-o", "json", "--show-managed-fields"))

    def condition(self, kind: str = "Programmed") -> Any:
        """Return a condition of the policy, empty without it."""
        conditions = self.get().get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def access(self, folder: Path) -> Path:
        """Write a kubeconfig of a service account that may do what the controller needs, and no more."""
        self.kubectl("create", "serviceaccount", "controller")
        self.cluster.kubectl("-n", self.namespace, "apply", "-f", "-", input=RBAC)
        token = self.kubectl("create", "token", "controller").strip()
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        config["users"] = [{"name": "controller", "user": {"token": token}}]
        config["contexts"] = [
            {
                "name": "controller",
                "context": {"cluster": config["clusters"][0]["name"], "user": "controller"},
            }
        ]
        config["current-context"] = "controller"
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        return path


@pytest.fixture
def world(control_plane: Cluster, namespace: str) -> World:
    """Return a namespace of an API server that knows KVServePolicies."""
    control_plane.kubectl("apply", "--server-side", "-f", str(CRD))
    control_plane.wait_established("kvservepolicies.kvserve.io")
    return World(control_plane, namespace)


@pytest.fixture
async def client(world: World) -> AsyncIterator[KubeClient]:
    """Return a session with the API server."""
    async with KubeClient(Access.from_file(world.cluster.kubeconfig)) as opened:
        yield opened
    # TLS connections end in later turns of the loop
    await asyncio.sleep(0.25)


@pytest.fixture
async def snapshots(world: World, client: KubeClient) -> AsyncIterator[list[Snapshot]]:
    """Return what a source of the namespace publishes, as it does."""
    published: list[Snapshot] = []
    running = asyncio.create_task(ClusterSource(client, world.namespace).run(published.append))
    yield published
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_source_follows_the_cluster(world: World, snapshots: list[Snapshot]) -> None:
    """Policies and the sets in force for them appear, change and go as in the cluster."""

    def entry() -> Entry | None:
        return snapshots[-1].get(world.key) if snapshots else None

    await until(lambda: snapshots)
    assert snapshots[-1] == {}
    await asyncio.to_thread(world.policy)
    await until(lambda: (e := entry()) and e.policy is not None)
    assert (first := entry()) is not None
    assert (first.pareto, first.problem, first.generation) == (None, None, 1)
    await asyncio.to_thread(world.set)
    await until(lambda: (e := entry()) and e.pareto == pareto())
    await asyncio.to_thread(world.set, "set-2", profiles=(INT4, RAW))
    await until(lambda: (e := entry()) and e.pareto == pareto(INT4, RAW))
    await asyncio.to_thread(world.kubectl, "delete", "configmap", "set-2")
    await until(lambda: (e := entry()) and e.problem is not None)
    assert (gone := entry()) is not None
    assert "configmap/set-2: is missing" in str(gone.problem)
    await asyncio.to_thread(world.kubectl, "delete", "kvp", "chat")
    await until(lambda: entry() is None)


async def test_changed_set_is_refused(world: World, snapshots: list[Snapshot]) -> None:
    """A set whose content is not what its digest says is a problem, not a set."""
    await asyncio.to_thread(world.policy)
    await asyncio.to_thread(world.set, digest="sha256:" + "0" * 64)
    await until(
        lambda: snapshots and world.key in snapshots[-1] and snapshots[-1][world.key].problem
    )
    entry = snapshots[-1][world.key]
    assert entry.pareto is None
    assert "was changed: has digest" in str(entry.problem)


async def test_status_is_written_on_change_only(
    world: World, client: KubeClient, snapshots: list[Snapshot]
) -> None:
    """The same status is written once, observed times rarely, other changes soon, and only our own fields."""
    await asyncio.to_thread(world.policy)
    await asyncio.to_thread(world.set)
    await until(
        lambda: snapshots and world.key in snapshots[-1] and snapshots[-1][world.key].pareto
    )
    writer = StatusWriter(client)
    writer.follow(snapshots[-1])

    def value(reason: str = "Pending", observed: int = 100) -> dict[str, Any]:
        condition = {
            "type": "Programmed",
            "status": "False",
            "observedGeneration": 1,
            "reason": reason,
            "message": "m",
        }
        objective = {"name": "ttft", "observedMilliseconds": observed}
        target = {"role": "Decode", "connected": 1, "synced": 0, "stale": 1, "rejected": 0}
        return {
            world.key: {
                "conditions": [condition],
                "objectives": [objective],
                "targets": [target],
                "history": [],
            }
        }

    writes = [
        await writer.write(status, Instant(at_s, at_s))
        for status, at_s in (
            (value(), 0.0),
            (value(), 100.0),
            (value(observed=200), 101.0),
            (value(observed=300), 102.0),
            (value(observed=300), 111.5),
            (value("Rejected"), 112.0),
            (value("Rejected"), 113.6),
        )
    ]
    assert writes == [1, 0, 1, 0, 1, 0, 1]
    found = await asyncio.to_thread(world.get)
    assert {c["type"]: c["reason"] for c in found["status"]["conditions"]} == {
        "Accepted": "Accepted",
        "Programmed": "Rejected",
    }
    decode = next(t for t in found["status"]["targets"] if t["role"] == "Decode")
    assert (decode["desired"], decode["connected"]) == (1, 1)

    again = StatusWriter(client)
    again.follow({world.key: Entry(policy=None, status=found["status"], uid="u")})
    assert await again.write(value("Rejected"), Instant(200.0, 200.0)) == 0


async def test_vanished_policy_does_not_stop_the_writer(world: World, client: KubeClient) -> None:
    """A policy that is deleted before its status is written is passed over."""
    writer = StatusWriter(client)
    writer.follow({world.key: Entry(policy=None, uid="u")})
    status = {world.key: {"conditions": [], "objectives": [{"name": "x"}]}}
    assert await writer.write(status, Instant(0.0, 0.0)) == 1
    assert await writer.write(status, Instant(10.0, 10.0)) == 0


@pytest.mark.slow
async def test_process_end_to_end(world: World, controller_process: Process) -> None:
    """With no more rights than documented, a real controller programs two pods and keeps the status of a policy."""
    process = controller_process
    path = await asyncio.to_thread(world.access, process.folder)
    process.environment = {"KUBECONFIG": str(path)}
    process.arguments = ("--kubernetes", "--namespace", world.namespace)
    move = {"name": "move", "metric": "KVTransferTime", "thresholdMilliseconds": 50}
    await asyncio.to_thread(world.policy, slo={"objectives": [move]})
    await asyncio.to_thread(process.start)
    hello = {"namespace": world.namespace}
    async with (
        PodClient(process.address, "p", "Prefill", hello=dict(hello)) as producer,
        PodClient(process.address, "d", "Decode", hello=dict(hello)) as decoder,
    ):
        await reason(world, "NoProfiles")
        await asyncio.to_thread(world.set)
        await until(lambda: producer.table and decoder.table)
        await reason(world, "Acknowledged")
        # as small as it was profiled: a transfer that was not would correct the ratio
        await decoder.report(*[transfer_report("int4", wire_bytes=2_809_000)] * 5)
        await reason(world, "Breached", "ObjectivesMet")
        found = await asyncio.to_thread(world.get)
        assert found["status"]["activeProfile"]["name"] == "int4"
        assert found["status"]["activeProfile"]["compressionRatio"] == "3.6x"
        assert "int4" in await asyncio.to_thread(world.kubectl, "get", "kvp", "chat")
        managers = {m["manager"] for m in found["metadata"]["managedFields"]}
        assert managers >= {"kvserve-controller", "kvserve-operator"}

        await asyncio.sleep(3)
        version = (await asyncio.to_thread(world.get))["metadata"]["resourceVersion"]
        await asyncio.sleep(4)
        settled = await asyncio.to_thread(world.get)
        assert settled["metadata"]["resourceVersion"] == version

        pinned = {"mode": "Pinned", "pinnedProfile": "int5"}
        await asyncio.to_thread(world.policy, control=pinned)
        await reason(world, "InvalidPolicy")
        assert "known: int4, int8, none, rans" in world.condition()["message"]
        assert producer.table is not None
        assert producer.table.pinned is None
    assert await asyncio.to_thread(process.end) == 0
    allowed = await asyncio.to_thread(
        world.kubectl,
        *("auth", "can-i", "--list"),
        f"--as=system:serviceaccount:{world.namespace}:controller",
    )
    assert "secrets" not in allowed


async def reason(world: World, wanted: str, kind: str = "Programmed") -> None:
    """Wait until a condition has a reason."""
    for _ in range(150):
        found = await asyncio.to_thread(world.condition, kind)
        if found.get("reason") == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{kind} is {found}, not {wanted}")
