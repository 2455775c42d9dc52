"""What the operator knows of a policy and its children, as values read from Kubernetes objects.

Facts keep what decisions need and drop the rest, so that thousands of pods and Pareto sets of hundreds of KiB cost
little memory. Reading never fails: an object that makes no sense yields facts that say so.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from kvserve_api.errors import KVServeError, PolicyError
from kvserve_api.names import RUN_PROGRESS_KEY
from kvserve_api.policy import Policy
from kvserve_api.progress import Progress
from kvserve_operator.jobs import JobFacts, PodFacts
from kvserve_operator.meta import JsonObject, Meta
from kvserve_operator.sets import SetFacts


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
