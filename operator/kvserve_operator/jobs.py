"""What the operator knows of profiling Jobs and of pods: theirs, and those that policies may select."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from kvserve_operator.meta import MAX_TEXT, JsonObject, Meta

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
            failure=(failed.get("reason", ""), failed.get("message", "")[:MAX_TEXT]),
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
        text = f"{reason}: {waiting.get('message', '')}"[:MAX_TEXT]
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
            ended_with=(ended.get("message") or "").strip()[:MAX_TEXT],
            image_problem=text if reason in _IMAGE_REASONS else "",
            config_problem=text if reason in _CONFIG_REASONS else "",
            unschedulable=scheduled.get("message", "")[:MAX_TEXT] if waits else "",
        )


def exit_code(job: JobFacts, pods: tuple[PodFacts, ...]) -> int | None:
    """Return what failed the Job, from the Job controller's message, or what its last pod ended with."""
    found = _EXIT_CODE.search(job.failure[1])
    if found and job.failure[0] == "PodFailurePolicy":
        return int(found.group(1))
    ended = [p for p in pods if p.job == job.meta.name and p.exit_code is not None and not p.helps]
    if ended:
        return max(ended, key=lambda pod: (pod.meta.created, pod.meta.name)).exit_code
    return int(found.group(1)) if found else None
