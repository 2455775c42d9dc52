"""Which policy a pod belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.errors import PolicyError, SpecError
from kvserve_api.policy import Policy, Target
from kvserve_api.table import Role, Version

MAX_NAME: Final = 253
MAX_LABELS: Final = 128
MAX_STAGES: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A serving pod, or one of several engines in it, as it introduces itself.

    Attributes:
        namespace: Its namespace.
        name: Its name, unique in the namespace.
        role: What it does.
        policy: ``namespace/name`` of the policy it asks for; empty if its labels decide.
        labels: Its labels.
        model_fingerprint: Of the model it serves; empty if it doesn't say.
        connector_version: The version of its connector.
        version: Of the table it holds; None without one.
        stages: The ids of the stages it can code and decode.
    """

    namespace: str
    name: str
    role: Role
    policy: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    model_fingerprint: str = ""
    connector_version: str = ""
    version: Version | None = None
    stages: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @classmethod
    def read(cls, hello: Any) -> Self:
        """Read a pod's ``Hello``.

        Raises:
            SpecError: A field is missing, too long or of an unknown form.
        """
        for name in ("pod", "namespace", "policy", "model_fingerprint", "connector_version"):
            if len(getattr(hello, name)) > MAX_NAME:
                raise SpecError(f"hello.{name}", f"must have at most {MAX_NAME} characters")
        if len(hello.labels) > MAX_LABELS or len(hello.stages) > MAX_STAGES:
            raise SpecError(
                "hello", f"must have at most {MAX_LABELS} labels and {MAX_STAGES} stages"
            )
        if not hello.pod:
            raise SpecError("hello.pod", "is required: the name of the pod")
        if hello.role not in tuple(Role):
            raise SpecError("hello.role", f"must be {' or '.join(Role)}, got {hello.role!r}")
        namespace = hello.namespace or "default"
        policy = hello.policy
        return cls(
            namespace=namespace,
            name=hello.pod,
            role=Role(hello.role),
            policy=policy if "/" in policy or not policy else f"{namespace}/{policy}",
            labels=dict(hello.labels),
            model_fingerprint=hello.model_fingerprint,
            connector_version=hello.connector_version,
            version=(
                Version(epoch=hello.version.epoch, counter=hello.version.counter)
                if hello.HasField("version")
                else None
            ),
            stages=frozenset(hello.stages),
        )


def match(pod: Pod, policies: Mapping[str, Policy]) -> str | None:
    """Return the key of the policy a pod belongs to; None if there is none (yet).

    Args:
        pod: The pod.
        policies: By key, the one that wins where several select the same pod before the others.

    Raises:
        PolicyError: The policy has this pod in the other role.
    """
    if pod.policy:
        if pod.policy not in policies:
            return None
        _check_role(pod, policies[pod.policy])
        return pod.policy
    for key, policy in policies.items():
        if policy.namespace == pod.namespace and _roles(pod, policy):
            _check_role(pod, policy)
            return key
    return None


def selecting(policies: Mapping[str, Policy]) -> list[tuple[str, str, tuple[Target, ...]]]:
    """Return all that `match` looks at: policies that agree in it, in this order, select the same pods."""
    return [(key, policy.namespace, policy.targets) for key, policy in policies.items()]


def _roles(pod: Pod, policy: Policy) -> list[str]:
    return [target.role for target in policy.targets if target.matches(pod.labels)]


def _check_role(pod: Pod, policy: Policy) -> None:
    """Refuse a pod that the policy selects, but in another role; one it doesn't select at all asked for the policy."""
    roles = _roles(pod, policy)
    if roles and pod.role not in roles:
        raise PolicyError(
            "spec.targets",
            f"policy {policy.key} selects pod {pod.key} as {roles[0]}, but the pod runs as {pod.role}:"
            " correct the selector or the pod's kv_role",
        )
