"""The volumes of a profiling Job: what it reads of the policy's namespace, and where it may write."""

from collections.abc import Iterator
from typing import Any, Final

from kvserve_api.names import CLAIMS_DIR, RUN_INPUTS_KEY, TASKS_DIR
from kvserve_api.policy import Policy
from kvserve_operator.config import ArtifactsConfig

RUN_DIR: Final = "/etc/kvserve/run"
TEXTS_DIR: Final = "/etc/kvserve/texts"
MODEL_DIR: Final = "/model"
ARTIFACTS: Final = "artifacts"
"""Name of the volume that calibration bundles go to."""


def mounts(policy: Policy, artifacts: ArtifactsConfig) -> list[dict[str, Any]]:
    """Return where the container finds the volumes."""
    found: list[dict[str, Any]] = [
        {"name": "run", "mountPath": RUN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if _texts(policy):
        found.append({"name": "texts", "mountPath": TEXTS_DIR, "readOnly": True})
    if _tasks(policy):
        found.append({"name": "tasks", "mountPath": TASKS_DIR, "readOnly": True})
    for number, claim in enumerate(_claims(policy)):
        path = f"{CLAIMS_DIR}/{claim}"
        found.append({"name": f"claim-{number}", "mountPath": path, "readOnly": True})
    if policy.model.source:
        found.append({"name": "model", "mountPath": MODEL_DIR, "readOnly": True})
    if artifacts.volume:
        found.append({"name": ARTIFACTS, "mountPath": artifacts.folder})
    return found


def volumes(policy: Policy, configmap: str, artifacts: ArtifactsConfig) -> list[dict[str, Any]]:
    """Return the volumes of the pod.

    Args:
        policy: The policy.
        configmap: Name of the run's ConfigMap.
        artifacts: Where calibration bundles go.
    """
    inputs = [{"key": RUN_INPUTS_KEY, "path": RUN_INPUTS_KEY}]
    found: list[dict[str, Any]] = [
        {"name": "run", "configMap": {"name": configmap, "items": inputs}},
        {"name": "tmp", "emptyDir": {}},
    ]
    for name, sources in (("texts", _texts(policy)), ("tasks", _tasks(policy))):
        if sources:
            found.append({"name": name, "projected": {"sources": sources}})
    found += [
        {"name": f"claim-{number}", **_claim(claim)} for number, claim in enumerate(_claims(policy))
    ]
    source = policy.model.source
    if source:
        found.append({"name": "model", **_claim(source.claim_name)})
    if artifacts.volume:
        found.append({"name": ARTIFACTS, **artifacts.volume})
    return found


def _texts(policy: Policy) -> list[dict[str, Any]]:
    return [
        _source(c.text.config_map, c.text.key, f"{name}.txt")
        for name, c in sorted(policy.classes.items())
        if c.text is not None
    ]


def _tasks(policy: Policy) -> list[dict[str, Any]]:
    return [
        _source(task.config_map, task.key, f"{name}.{task.name}.jsonl")
        for name, c in sorted(policy.classes.items())
        for task in c.tasks
        if task.config_map
    ]


def _claims(policy: Policy) -> Iterator[str]:
    """Yield the claims that hold items of tasks, each once."""
    claims = {task.claim for c in policy.classes.values() for task in c.tasks if task.claim}
    yield from sorted(claims)


def _source(config_map: str, key: str, path: str) -> dict[str, Any]:
    return {"configMap": {"name": config_map, "items": [{"key": key, "path": path}]}}


def _claim(name: str) -> dict[str, Any]:
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}
