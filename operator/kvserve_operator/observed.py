"""What the operator knows of a policy and its children, as values read from Kubernetes objects.

Facts keep what decisions need and drop the rest, so that thousands of pods and Pareto sets of hundreds of KiB cost
little memory. Reading never fails: an object that makes no sense yields facts that say so.
"""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import KVServeError, PolicyError
from kvserve_api.names import (
    ANNOTATION_DIGEST,
    ANNOTATION_INPUTS,
    LABEL_POLICY,
    RUN_PROGRESS_KEY,
)
from kvserve_api.policy import Policy
from kvserve_api.profile_set import CONFIGMAP_KEY, NONE, ParetoSet
from kvserve_api.progress import Progress
from kvserve_api.quality import TaskScore

ANNOTATION_RESOURCES: Final = "kvserve.io/resources"
"""On a Job: the digest of its container's resources as they were asked for."""
LABEL_INDEX: Final = "batch.kubernetes.io/job-completion-index"
LABEL_JOB: Final = "batch.kubernetes.io/job-name"
_IMAGE_REASONS: Final = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
    "ImageInspectError",
}
_CONFIG_REASONS: Final = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_EXIT_CODE: Final = re.compile(r"exit code (\d{1,3})\b")
_MAX_TEXT: Final = 512

JsonObject = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """What every object has.

    Attributes:
        namespace: Its namespace.
        name: Its name.
        uid: Its identity; a new object of the same name has another.
        version: Grows with each change, over all objects.
        created: Creation time, in RFC 3339; such times of one cluster compare as strings.
        deleting: It is on its way out.
        policy: The policy's name, from the label; empty if it has none.
        owner_uid: The uid of the KVServePolicy that owns it, or empty.
        inputs_digest: Digest of the inputs of the run it belongs to, or empty.
    """

    namespace: str
    name: str
    uid: str
    version: int = 0
    created: str = ""
    deleting: bool = False
    policy: str = ""
    owner_uid: str = ""
    inputs_digest: str = ""

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read the metadata of an object."""
        metadata = value["metadata"]
        owners = metadata.get("ownerReferences") or []
        return cls(
            namespace=metadata.get("namespace", ""),
            name=metadata["name"],
            uid=metadata.get("uid", ""),
            version=int(metadata.get("resourceVersion") or 0),
            created=metadata.get("creationTimestamp") or "",
            deleting=metadata.get("deletionTimestamp") is not None,
            policy=(metadata.get("labels") or {}).get(LABEL_POLICY, ""),
            owner_uid=next((o["uid"] for o in owners if o.get("kind") == "KVServePolicy"), ""),
            inputs_digest=(metadata.get("annotations") or {}).get(ANNOTATION_INPUTS, ""),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyFacts:
    """A policy.

    Attributes:
        meta: Its metadata.
        generation: Grows with each change of the spec.
        policy: What it wants; None if it can't be read.
        problem: Why it can't be read, or empty.
        status: Its status as it is.
    """

    meta: Meta
    generation: int
    policy: Policy | None
    problem: str = ""
    status: JsonObject = field(default_factory=dict)

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read a KVServePolicy."""
        policy, problem = None, ""
        try:
            policy = Policy.from_object(value)
        except PolicyError as error:
            problem = str(error)
        return cls(
            meta=Meta.read(value),
            generation=int(value["metadata"].get("generation", 1)),
            policy=policy,
            problem=problem,
            status=value.get("status") or {},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFacts:
    """A profiling Job.

    Attributes:
        meta: Its metadata.
        suspended: It is told to pause.
        deadline_s: Most seconds it may take.
        resources_digest: Digest of the resources that were asked for it.
        complete: It ended well.
        failed: It ended badly.
        failure: Why, in the Job controller's words: reason and message.
        started: When it started, in RFC 3339, or empty.
        ended: When it ended, or empty.
    """

    meta: Meta
    suspended: bool = False
    deadline_s: int = 0
    resources_digest: str = ""
    complete: bool = False
    failed: bool = False
    failure: tuple[str, str] = ("", "")
    started: str = ""
    ended: str = ""

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read a Job."""
        spec, status = value.get("spec") or {}, value.get("status") or {}
        held = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
        failed = held.get("Failed", {})
        return cls(
            meta=Meta.read(value),
            suspended=bool(spec.get("suspend", False)),
            deadline_s=int(spec.get("activeDeadlineSeconds") or 0),
            resources_digest=(value["metadata"].get("annotations") or {}).get(
                ANNOTATION_RESOURCES, ""
            ),
            complete="Complete" in held,
            failed="Failed" in held,
            failure=(failed.get("reason", ""), failed.get("message", "")[:_MAX_TEXT]),
            started=status.get("startTime") or "",
            ended=status.get("completionTime") or failed.get("lastTransitionTime") or "",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PodFacts:
    """A pod: of a profiling Job, or one that a policy may select.

    Attributes:
        meta: Its metadata.
        labels: Its labels.
        job: The Job it belongs to, or empty.
        helps: It is one of a Job's pods that measure what another hands out.
        live: It has not ended and is not on its way out.
        exit_code: What its container ended with; None if it did not end.
        out_of_memory: Its container was killed for using too much memory.
        ended_with: What its container said at the end.
        image_problem: Why its image can't be had, or empty.
        config_problem: Why its container can't be made, or empty.
        unschedulable: Why no node takes it, or empty.
    """

    meta: Meta
    labels: Mapping[str, str] = field(default_factory=dict)
    job: str = ""
    helps: bool = False
    live: bool = True
    exit_code: int | None = None
    out_of_memory: bool = False
    ended_with: str = ""
    image_problem: str = ""
    config_problem: str = ""
    unschedulable: str = ""

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read a pod."""
        meta, status = Meta.read(value), value.get("status") or {}
        labels = value["metadata"].get("labels") or {}
        live = not meta.deleting and status.get("phase") not in ("Succeeded", "Failed")
        job = labels.get(LABEL_JOB, "")
        if not (job and meta.policy):
            return cls(meta=meta, labels=labels, live=live)
        state = next(iter(status.get("containerStatuses") or [{}])).get("state") or {}
        ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
        reason = waiting.get("reason", "")
        text = f"{reason}: {waiting.get('message', '')}"[:_MAX_TEXT]
        scheduled: JsonObject = next(
            (c for c in status.get("conditions") or [] if c.get("type") == "PodScheduled"), {}
        )
        waits = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        return cls(
            meta=meta,
            labels=labels,
            job=job,
            helps=labels.get(LABEL_INDEX, "0") != "0",
            live=live,
            exit_code=ended.get("exitCode"),
            out_of_memory=ended.get("reason") == "OOMKilled",
            ended_with=(ended.get("message") or "").strip()[:_MAX_TEXT],
            image_problem=text if reason in _IMAGE_REASONS else "",
            config_problem=text if reason in _CONFIG_REASONS else "",
            unschedulable=scheduled.get("message", "")[:_MAX_TEXT] if waits else "",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The ConfigMap of a run: its inputs and progress.

    Attributes:
        meta: Its metadata.
        progress: How far the run is; None before it began, and where the text makes no sense.
    """

    meta: Meta
    progress: Progress | None = None

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read a run's ConfigMap."""
        document = (value.get("data") or {}).get(RUN_PROGRESS_KEY)
        progress = None
        if document is not None:
            try:
                progress = Progress.parse(document)
            except KVServeError:
                progress = None
        return cls(meta=Meta.read(value), progress=progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFacts:
    """What a profile of a Pareto set may lose.

    Attributes:
        name: Its name.
        loss_upper_bp: Upper limit of the growth of perplexity, in basis points.
        lossless: It changes nothing.
        tasks: Its answers to tasks.
    """

    name: str
    loss_upper_bp: float
    lossless: bool = False
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """A Pareto ConfigMap.

    Attributes:
        meta: Its metadata.
        digest: Digest of its document.
        problem: Why it must not be used, or empty.
        model: The model it was measured on.
        losses: For each workload class what the profiles but ``none`` may lose.
        profiles: How many different profiles it holds, ``none`` included.
    """

    meta: Meta
    digest: str = ""
    problem: str = ""
    model: str = ""
    losses: Mapping[str, tuple[ProfileFacts, ...]] = field(default_factory=dict)
    profiles: int = 0

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read and check a Pareto ConfigMap."""
        meta = Meta.read(value)
        document = (value.get("data") or {}).get(CONFIGMAP_KEY)
        if document is None:
            return cls(meta=meta, problem=f"has no key {CONFIGMAP_KEY}")
        digest = digest_bytes(document.encode())
        named = (value["metadata"].get("annotations") or {}).get(ANNOTATION_DIGEST, "")
        if named != digest:
            return cls(meta=meta, problem=f"was changed: its document's digest is {digest}")
        try:
            pareto = ParetoSet.parse(document.encode())
        except KVServeError as error:
            return cls(meta=meta, problem=str(error)[:_MAX_TEXT])
        losses = {
            name: tuple(
                ProfileFacts(
                    name=p.name, loss_upper_bp=p.loss_upper_bp, lossless=p.lossless, tasks=p.tasks
                )
                for p in profiles
                if p.name != NONE
            )
            for name, profiles in pareto.classes.items()
        }
        return cls(
            meta=meta,
            digest=digest,
            model=pareto.model.name,
            losses=losses,
            profiles=len({p.name for profiles in pareto.classes.values() for p in profiles}),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """An evaluation text, or the items of a task.

    Attributes:
        digest: Digest of its bytes; None if it can't be had.
        problem: Why it can't be had, or empty.
    """

    digest: str | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """All that a plan is made of.

    Attributes:
        policy: The policy.
        now: The time, with zone.
        winner: The older policy that selects the same pods, or empty.
        texts: The evaluation text of each workload class that names one.
        tasks: The items of each workload class and task that are in a ConfigMap.
        jobs: The policy's Jobs.
        job_pods: Pods of its Jobs.
        runs: Its runs' ConfigMaps.
        sets: Its Pareto ConfigMaps.
        desired: Live pods of each role.
        refused: What the API server refused when the plan was last carried out, or empty.
    """

    policy: PolicyFacts
    now: datetime.datetime
    winner: str = ""
    texts: Mapping[str, TextFacts] = field(default_factory=dict)
    tasks: Mapping[tuple[str, str], TextFacts] = field(default_factory=dict)
    jobs: tuple[JobFacts, ...] = ()
    job_pods: tuple[PodFacts, ...] = ()
    runs: tuple[RunFacts, ...] = ()
    sets: tuple[SetFacts, ...] = ()
    desired: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""


def exit_code(job: JobFacts, pods: tuple[PodFacts, ...]) -> int | None:
    """Return what failed the Job, from the Job controller's message, or what its last pod ended with."""
    found = _EXIT_CODE.search(job.failure[1])
    if found and job.failure[0] == "PodFailurePolicy":
        return int(found.group(1))
    ended = [p for p in pods if p.job == job.meta.name and p.exit_code is not None and not p.helps]
    if ended:
        return max(ended, key=lambda pod: (pod.meta.created, pod.meta.name)).exit_code
    return int(found.group(1)) if found else None
