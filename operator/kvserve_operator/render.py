"""The manifests of a profiling run: its ServiceAccount, Role, RoleBinding, ConfigMap and Job.

Their names follow from the policy's name and the digest of the run's inputs, so that writing them twice is harmless.
The service account may read and write the two ConfigMaps of its own run and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvserve_api.canonical import digest, short_digest
from kvserve_api.names import (
    ANNOTATION_INPUTS,
    ARTIFACT_PARETO,
    ARTIFACT_RUN,
    ENV_ARTIFACTS,
    LABEL_ARTIFACT,
    LABEL_POLICY,
    LABEL_RUN,
    RUN_INPUTS_KEY,
    ExitCode,
    child_name,
)
from kvserve_api.policy import API_VERSION, KIND, Policy
from kvserve_api.run import RunInputs
from kvserve_operator.config import ProfilerConfig
from kvserve_operator.jobs import ANNOTATION_RESOURCES
from kvserve_operator.volumes import MODEL_DIR, RUN_DIR, TEXTS_DIR, mounts, volumes

CONTAINER: Final = "profiler"
BACKOFF_LIMIT: Final = 2
USER: Final = 1000

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A profiling run of a policy: what to measure, and the names of its children.

    Attributes:
        policy: The policy.
        uid: The policy's uid.
        inputs: What to measure.
        config: What the Job's container is.
    """

    policy: Policy
    uid: str
    inputs: RunInputs
    config: ProfilerConfig

    @property
    def digest(self) -> str:
        """The digest of the inputs."""
        return self.inputs.digest

    @property
    def job(self) -> str:
        """Name of the Job, and of its ServiceAccount, Role and RoleBinding."""
        return child_name(self.policy.name, "job", self.digest)

    @property
    def configmap(self) -> str:
        """Name of the ConfigMap with inputs, progress and trials."""
        return child_name(self.policy.name, ARTIFACT_RUN, self.digest)

    @property
    def pareto(self) -> str:
        """Name of the ConfigMap that the Job writes its result to."""
        return child_name(self.policy.name, ARTIFACT_PARETO, self.digest)

    @property
    def resources(self) -> Mapping[str, Any]:
        """The resource requirements of the Job's container."""
        return self.policy.profiling.resources or self.config.resources

    def manifests(self) -> list[Manifest]:
        """Return all children, in the order to create them: the Job is last, so that it exists only if all do."""
        return [
            _child(self, "v1", "ServiceAccount", self.job),
            _role(self),
            _role_binding(self),
            _run_configmap(self),
            _job(self),
        ]


def _child(run: Run, api_version: str, kind: str, name: str, **parts: Any) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": run.policy.namespace,
            "labels": _labels(run),
            "annotations": {ANNOTATION_INPUTS: run.digest},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": run.policy.name,
                    "uid": run.uid,
                    "controller": True,
                }
            ],
        },
        **parts,
    }


def _labels(run: Run) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "kvserve-profiler",
        "app.kubernetes.io/managed-by": "kvserve-operator",
        LABEL_POLICY: run.policy.name,
        LABEL_RUN: short_digest(run.digest),
    }


def _role(run: Run) -> Manifest:
    def rule(verbs: list[str], *names: str) -> dict[str, Any]:
        value = {"apiGroups": [""], "resources": ["configmaps"], "verbs": verbs}
        return value | ({"resourceNames": list(names)} if names else {})

    # creating can't be limited to a name: the API server knows none yet when it asks for the permission
    rules = [rule(["create"]), rule(["get", "patch"], run.configmap), rule(["get"], run.pareto)]
    return _child(run, "rbac.authorization.k8s.io/v1", "Role", run.job, rules=rules)


def _role_binding(run: Run) -> Manifest:
    subject = {"kind": "ServiceAccount", "name": run.job, "namespace": run.policy.namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": run.job}
    return _child(
        run,
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        run.job,
        roleRef=reference,
        subjects=[subject],
    )


def _run_configmap(run: Run) -> Manifest:
    manifest = _child(run, "v1", "ConfigMap", run.configmap)
    manifest["metadata"]["labels"][LABEL_ARTIFACT] = ARTIFACT_RUN
    manifest["data"] = {RUN_INPUTS_KEY: run.inputs.canonical().decode()}
    return manifest


def _job(run: Run) -> Manifest:
    manifest = _child(run, "batch/v1", "Job", run.job)
    manifest["metadata"]["annotations"][ANNOTATION_RESOURCES] = digest(dict(run.resources))
    manifest["spec"] = {
        "backoffLimit": BACKOFF_LIMIT,
        "activeDeadlineSeconds": run.policy.profiling.active_deadline_s,
        "suspend": False,
        **_indexed(run),
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "In",
                        "values": sorted(
                            (ExitCode.BAD_INPUT, ExitCode.INFEASIBLE, ExitCode.UNSUPPORTED)
                        ),
                    },
                },
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {
            "metadata": {
                "labels": _labels(run),
                "annotations": {ANNOTATION_INPUTS: run.digest},
            },
            "spec": _pod_spec(run),
        },
    }
    return manifest


def _indexed(run: Run) -> dict[str, Any]:
    """Return what makes a Job of several pods, each with its index, that ends when all have ended."""
    pods = run.inputs.parallelism
    if pods == 1:
        return {}
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


def _pod_spec(run: Run) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "serviceAccountName": run.job,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 15,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
            **_group(run),
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": run.config.image,
                "imagePullPolicy": run.config.image_pull_policy,
                "command": list(run.config.command),
                "env": _env(run),
                **_env_from(run),
                "resources": dict(run.resources),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    *mounts(run.policy, run.config.artifacts),
                    *map(dict, run.config.extra_volume_mounts),
                ],
            }
        ],
        "volumes": [
            *volumes(run.policy, run.configmap, run.config.artifacts),
            *map(dict, run.config.extra_volumes),
        ],
    }


def _env(run: Run) -> list[dict[str, Any]]:
    source = run.policy.model.source
    values = {
        "KVSERVE_NAMESPACE": run.policy.namespace,
        "KVSERVE_POLICY": run.policy.name,
        "KVSERVE_POLICY_UID": run.uid,
        "KVSERVE_INPUTS": f"{RUN_DIR}/{RUN_INPUTS_KEY}",
        "KVSERVE_TEXTS": TEXTS_DIR,
        # the root file system is read-only
        "HOME": "/tmp",
    }
    if run.config.artifacts.url:
        values[ENV_ARTIFACTS] = run.config.artifacts.url
    if source:
        values["KVSERVE_MODEL_PATH"] = f"{MODEL_DIR}/{source.path.strip('/')}".rstrip("/")
    values |= run.config.passed_env
    extra = [dict(entry) for entry in run.config.extra_env]
    overridden = {entry["name"] for entry in extra}
    own = [{"name": n, "value": v} for n, v in sorted(values.items()) if n not in overridden]
    return own + extra


def _env_from(run: Run) -> dict[str, Any]:
    """Return the variables that come from the store's Secret."""
    secret = run.config.artifacts.secret
    return {"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}


def _group(run: Run) -> dict[str, Any]:
    """Return who a volume belongs to that the Job writes; walking through a large one at each start takes long."""
    if not run.config.artifacts.volume:
        return {}
    return {"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"}
