"""A run's output in Kubernetes: progress and trials in the run's ConfigMap, the Pareto set in an immutable one.

Under a ServiceAccount that may create ConfigMaps, get and patch the one of its run, and get the one of its result;
nothing else is asked of the API server.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from kvserve_api.canonical import canonical_json, short_digest
from kvserve_api.errors import SpecError, UnavailableError
from kvserve_api.names import (
    ANNOTATION_DIGEST,
    ANNOTATION_INPUTS,
    ARTIFACT_PARETO,
    LABEL_ARTIFACT,
    LABEL_POLICY,
    LABEL_RUN,
    RUN_PROGRESS_KEY,
    RUN_TRIALS_KEY,
    RUN_WORK_KEY,
    child_name,
)
from kvserve_api.policy import API_VERSION, KIND
from kvserve_api.profile_set import CONFIGMAP_KEY, ParetoSet
from kvserve_api.progress import Progress
from kvserve_profiler.trials import TrialLog

FIELD_MANAGER: Final = "kvserve-profiler"
MAX_LOG_BYTES: Final = 700 * 1024
"""What of a trial log fits into a ConfigMap beside the inputs; later trials of a larger one are not kept there."""
FINAL_STATUS: Final = (400, 404, 413, 422)
"""Answers that stay the same; 401 and 403 do not: a Role may take effect a moment after its Job."""
ATTEMPTS: Final = 5
TIMEOUT_S: Final = 10.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The policy that a run belongs to.

    Attributes:
        namespace: Where it lives.
        name: Its name.
        uid: Its uid.
    """

    namespace: str
    name: str
    uid: str

    def __post_init__(self) -> None:
        for field in ("namespace", "name", "uid"):
            if not getattr(self, field):
                raise SpecError(f"policy {field}", "must not be empty")


class AlreadyExistsError(SpecError):
    """An object of that name is there."""


class RunConfigMaps:
    """The ConfigMaps of one run.

    Attributes:
        pareto_name: Name of the ConfigMap of the result.
    """

    def __init__(
        self,
        owner: Owner,
        inputs_digest: str,
        *,
        pause_s: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect with the pod's ServiceAccount, or with ``KUBECONFIG`` outside a cluster.

        Args:
            owner: The policy.
            inputs_digest: Digest of the run's inputs.
            pause_s: Before the first retry, in seconds; doubles each time.
            sleep: How to wait.

        Raises:
            SpecError: There are no credentials.
        """
        self._client = _connect()
        self._api = client.CoreV1Api(self._client)
        self._owner = owner
        self._digest = inputs_digest
        self._pause_s = pause_s
        self._sleep = sleep
        self._run_name = child_name(owner.name, "run", inputs_digest)
        self.pareto_name = child_name(owner.name, "pareto", inputs_digest)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def load(self) -> str:
        """Return the trial log of an earlier pod of this run; empty for none.

        Raises:
            SpecError: The run's ConfigMap does not exist or may not be read.
            UnavailableError: The API server does not answer.
        """
        return self.read().get(RUN_TRIALS_KEY, "")

    def save(self, progress: Progress, log: TrialLog | None) -> None:
        """Write progress and, if there is one, the trial log.

        Raises:
            SpecError: The API server refuses for good.
            UnavailableError: The API server does not answer.
        """
        data = {RUN_PROGRESS_KEY: canonical_json(progress.to_json()).decode()}
        if log is not None:
            data[RUN_TRIALS_KEY] = _bounded(log.lines())
        self.write(data)

    def read(self) -> dict[str, str]:
        """Return all that is in the run's ConfigMap.

        Raises:
            SpecError: The run's ConfigMap does not exist or may not be read.
            UnavailableError: The API server does not answer.
        """
        return dict(self._read(self._run_name).data or {})

    def write(self, data: Mapping[str, str]) -> None:
        """Write some keys of the run's ConfigMap; what others write stays.

        Raises:
            SpecError: The API server refuses for good.
            UnavailableError: The API server does not answer.
        """
        self._retrying(
            f"patch ConfigMap {self._run_name}",
            lambda: self._api.patch_namespaced_config_map(
                self._run_name,
                self._owner.namespace,
                {"data": dict(data)},
                field_manager=FIELD_MANAGER,
                _request_timeout=TIMEOUT_S,
            ),
        )

    def offer(self, log: TrialLog | None, document: str) -> None:
        """Write the log, if there is one, and what helpers are to measure, both at once.

        Raises:
            SpecError: The API server refuses for good.
            UnavailableError: The API server does not answer.
        """
        known = {} if log is None else {RUN_TRIALS_KEY: _bounded(log.lines())}
        self.write(known | {RUN_WORK_KEY: document})

    def publish(self, result: ParetoSet) -> str:
        """Create the Pareto ConfigMap and return what happened, for people.

        One that exists stays, whatever it holds: it is immutable, and pods may use it already.

        Raises:
            ArtifactError: The set is larger than a ConfigMap may be.
            SpecError: The API server refuses for good.
            UnavailableError: The API server does not answer.
        """
        document = result.canonical()
        digest = result.digest
        # read as the controller will read it: a set that can't be read must not become immutable
        ParetoSet.parse(document)
        body = pareto_manifest(self._owner, self._digest, document, digest)
        name = self.pareto_name
        try:
            self._retrying(
                f"create ConfigMap {name}",
                lambda: self._api.create_namespaced_config_map(
                    self._owner.namespace,
                    body,
                    field_manager=FIELD_MANAGER,
                    _request_timeout=TIMEOUT_S,
                ),
            )
        except AlreadyExistsError:
            found = (self._read(name).metadata.annotations or {}).get(ANNOTATION_DIGEST)
            if found != digest:
                return f"kept ConfigMap {name} with digest {found}, which exists and is immutable"
        return f"ConfigMap {name} holds the set with digest {digest}"

    def _read(self, name: str) -> Any:
        return self._retrying(
            f"get ConfigMap {name}",
            lambda: self._api.read_namespaced_config_map(
                name, self._owner.namespace, _request_timeout=TIMEOUT_S
            ),
        )

    def _retrying(self, what: str, call: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(self._pause_s * 2 ** (attempt - 1))
            try:
                return call()
            except ApiException as error:
                failure: Exception = error
                if error.status == 409:
                    raise AlreadyExistsError(what, "exists already") from error
                if error.status in FINAL_STATUS:
                    raise SpecError(
                        what, f"the API server says {error.status} {error.reason}"
                    ) from error
            except urllib3.exceptions.HTTPError as error:
                failure = error
        raise UnavailableError(f"{what}: no success in {ATTEMPTS} attempts: {failure}")


def _connect() -> Any:
    """Return a client with credentials of its own: the package's global ones may be someone else's."""
    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            # named here, because the package reads the variable only when it is imported
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    except config.ConfigException as error:
        raise SpecError("kubernetes", f"no credentials for an API server: {error}") from error
    return client.ApiClient(settings)


def pareto_manifest(
    owner: Owner, inputs_digest: str, document: bytes, digest: str
) -> dict[str, Any]:
    """Return the immutable ConfigMap of a Pareto set.

    Args:
        owner: The policy; deleting it deletes the ConfigMap.
        inputs_digest: Digest of the run's inputs.
        document: The set's canonical JSON.
        digest: Digest of the document.
    """
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": child_name(owner.name, "pareto", inputs_digest),
            "namespace": owner.namespace,
            "labels": {
                LABEL_POLICY: owner.name,
                LABEL_ARTIFACT: ARTIFACT_PARETO,
                LABEL_RUN: short_digest(inputs_digest),
            },
            "annotations": {ANNOTATION_DIGEST: digest, ANNOTATION_INPUTS: inputs_digest},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                }
            ],
        },
        "immutable": True,
        "data": {CONFIGMAP_KEY: document.decode()},
    }


def _bounded(lines: list[str]) -> str:
    """Return the first lines that fit into a ConfigMap."""
    kept, size = [], 0
    for line in lines:
        size += len(line.encode())
        if size > MAX_LOG_BYTES:
            break
        kept.append(line)
    return "".join(kept)
