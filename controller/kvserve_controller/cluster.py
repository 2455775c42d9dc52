"""Policies and Pareto sets from a cluster: KVServePolicies, and the ConfigMaps that hold their sets."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.names import ANNOTATION_DIGEST, ARTIFACT_PARETO, LABEL_ARTIFACT
from kvserve_api.policy import GROUP, PLURAL, VERSION, Policy
from kvserve_api.profile_set import CONFIGMAP_KEY, ParetoSet
from kvserve_controller.kube_client import Collection, KubeClient
from kvserve_controller.reflector import Key, Reflector
from kvserve_controller.source import Entry, Publish, Snapshot

PREFIX: Final = f"/apis/{GROUP}/{VERSION}"
SETTLE_S: Final = 0.05
"""How long changes are collected before they are published together."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of one object, and which object that was."""

    identity: tuple[str, str]
    value: Any
    problem: SpecError | None


class ClusterSource:
    """Watches one namespace or all.

    The set in force for a policy is the one that the operator named in ``status.pareto.configMapRef``.
    """

    def __init__(self, client: KubeClient, namespace: str = "") -> None:
        """Make a source.

        Args:
            client: An open session with the API server.
            namespace: Which to watch; empty for all.
        """
        self._changed = asyncio.Event()
        self._policies = Reflector(
            client,
            Collection(prefix=PREFIX, plural=PLURAL, namespace=namespace),
            self._changed.set,
        )
        self._sets = Reflector(
            client,
            Collection(
                prefix="/api/v1",
                plural="configmaps",
                namespace=namespace,
                selector=f"{LABEL_ARTIFACT}={ARTIFACT_PARETO}",
            ),
            self._changed.set,
        )
        self._read_policies: dict[Key, _Read] = {}
        self._read_sets: dict[Key, _Read] = {}

    @property
    def alive_s(self) -> float:
        """When the more silent of both watches last brought something, on the monotonic clock, in seconds."""
        return min(self._policies.alive_s, self._sets.alive_s)

    async def run(self, publish: Publish) -> None:
        """Publish all that is there, then again after each change, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._policies.run())
            tasks.create_task(self._sets.run())
            while True:
                await self._changed.wait()
                await asyncio.sleep(SETTLE_S)
                self._changed.clear()
                if self._policies.synced and self._sets.synced:
                    publish(self.snapshot())

    def snapshot(self) -> Snapshot:
        """Return the policies with their sets as they are now."""
        self._read_policies = {
            key: _read(self._read_policies.get(key), item, Policy.from_object)
            for key, item in self._policies.objects.items()
        }
        self._read_sets = {
            key: _read(self._read_sets.get(key), item, _pareto)
            for key, item in self._sets.objects.items()
        }
        return {
            f"{namespace}/{name}": self._entry(
                namespace, item, self._read_policies[namespace, name]
            )
            for (namespace, name), item in self._policies.objects.items()
        }

    def _entry(self, namespace: str, item: Mapping[str, Any], read: _Read) -> Entry:
        metadata = item["metadata"]
        status = item.get("status", {})
        pareto, problem = self._set_of(namespace, status.get("pareto", {}))
        return Entry(
            policy=read.value,
            pareto=pareto,
            problem=read.problem or problem,
            uid=metadata["uid"],
            created=metadata["creationTimestamp"],
            generation=metadata["generation"],
            status=status,
        )

    def _set_of(
        self, namespace: str, reference: Mapping[str, Any]
    ) -> tuple[ParetoSet | None, SpecError | None]:
        name = reference.get("configMapRef", {}).get("name")
        if not name:
            return None, None
        read = self._read_sets.get((namespace, name))
        if read is None:
            return None, ArtifactError(
                f"configmap/{name}",
                f"is missing or has no label {LABEL_ARTIFACT}={ARTIFACT_PARETO}: profile again",
            )
        if read.value is None:
            return None, read.problem
        digest, pareto = read.value
        if reference.get("digest", digest) != digest:
            return None, ArtifactError(
                f"configmap/{name}", f"has digest {digest}, not the one in the policy's status"
            )
        return pareto, None


def _read(known: _Read | None, item: Mapping[str, Any], parse: Any) -> _Read:
    """Parse an object, unless that version of it was parsed before."""
    metadata = item["metadata"]
    # a policy's status changes often, its spec seldom; ConfigMaps have no generation
    identity = (metadata["uid"], str(metadata.get("generation", metadata["resourceVersion"])))
    if known is not None and known.identity == identity:
        return known
    try:
        return _Read(identity, parse(item), None)
    except SpecError as error:
        return _Read(identity, None, error)


def _pareto(item: Mapping[str, Any]) -> tuple[str, ParetoSet]:
    """Return a set and its digest, which must be the one its ConfigMap names."""
    metadata = item["metadata"]
    path = f"configmap/{metadata['name']}"
    document = item.get("data", {}).get(CONFIGMAP_KEY, "").encode()
    if not document:
        raise ArtifactError(path, f"holds no {CONFIGMAP_KEY}: profile again")
    digest = digest_bytes(document)
    named = metadata.get("annotations", {}).get(ANNOTATION_DIGEST, "")
    if named != digest:
        raise ArtifactError(path, f"was changed: has digest {digest}, not {named or 'any'}")
    return digest, ParetoSet.parse(document)
