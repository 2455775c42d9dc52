"""Carrying out a plan's actions on the API server."""

import logging
from typing import Any, Final, assert_never

from kvserve_api.policy import API_VERSION, GROUP, KIND, PLURAL, VERSION
from kvserve_operator.client import APPLY, FIELD_MANAGER, MERGE, ApiError, Client
from kvserve_operator.events import Recorder
from kvserve_operator.observed import PolicyFacts
from kvserve_operator.plan import Apply, ApplyStatus, Change, Delete, Record, Tune

_COLLECTIONS: Final = {
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "ConfigMap": ("api/v1", "configmaps"),
    "Role": ("apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "Job": ("apis/batch/v1", "jobs"),
    KIND: (f"apis/{GROUP}/{VERSION}", PLURAL),
}
_FORCED: Final = {"fieldManager": FIELD_MANAGER, "force": "true"}

logger = logging.getLogger(__name__)


def path_of(kind: str, namespace: str, name: str) -> str:
    """Return an object's path on the API server."""
    base, plural = _COLLECTIONS[kind]
    return f"/{base}/namespaces/{namespace}/{plural}/{name}"


class Executor:
    """Carries out actions about a policy."""

    def __init__(self, client: Client, recorder: Recorder) -> None:
        self._client = client
        self._recorder = recorder

    async def carry_out(self, action: Change, policy: PolicyFacts) -> dict[str, Any] | None:
        """Carry out one action.

        Returns:
            The object as it is now, or None where there is none to tell of.

        Raises:
            ApiError: The API server refuses it.
            NotLeaderError: This process does not lead.
            UnavailableError: The API server does not answer.
        """
        match action:
            case Apply():
                return await self._apply(action)
            case Tune():
                return await self._tune(action)
            case Delete():
                return await self._delete(action)
            case ApplyStatus():
                return await self._apply_status(action, policy)
            case Record():
                await self._recorder.record(policy, action)
                return None
            case _:
                assert_never(action)

    async def _apply(self, action: Apply) -> dict[str, Any]:
        manifest = action.manifest
        kind, metadata = manifest["kind"], manifest["metadata"]
        path = path_of(kind, metadata["namespace"], metadata["name"])
        logger.info("apply %s %s/%s", kind, metadata["namespace"], metadata["name"])
        return await self._client.write(
            "PATCH", path, manifest, content_type=APPLY, params=_FORCED, kind=kind
        )

    async def _tune(self, action: Tune) -> dict[str, Any] | None:
        meta = action.job
        logger.info("tune Job %s/%s", meta.namespace, meta.name)
        body = {
            "metadata": {"resourceVersion": str(meta.version), "uid": meta.uid},
            "spec": {"suspend": action.suspend, "activeDeadlineSeconds": action.deadline_s},
        }
        path = path_of("Job", meta.namespace, meta.name)
        params = {"fieldManager": FIELD_MANAGER}
        try:
            return await self._client.write(
                "PATCH", path, body, content_type=MERGE, params=params, kind="Job"
            )
        except ApiError as error:
            # it changed or went meanwhile: the watch brings what it is now
            if error.status in (404, 409):
                return None
            raise

    async def _delete(self, action: Delete) -> dict[str, Any] | None:
        logger.info("delete %s %s/%s", action.kind, action.namespace, action.name)
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
        }
        if action.uid:
            body["preconditions"] = {"uid": action.uid}
        path = path_of(action.kind, action.namespace, action.name)
        try:
            return await self._client.write("DELETE", path, body, kind=action.kind)
        except ApiError as error:
            if error.status in (404, 409):
                return None
            raise

    async def _apply_status(self, action: ApplyStatus, policy: PolicyFacts) -> dict[str, Any]:
        meta = policy.meta
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            # with the uid a policy that was deleted and made anew is not taken for the old one
            "metadata": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
            "status": action.status,
        }
        path = f"{path_of(KIND, meta.namespace, meta.name)}/status"
        return await self._client.write(
            "PATCH", path, body, content_type=APPLY, params=_FORCED, kind=KIND
        )
