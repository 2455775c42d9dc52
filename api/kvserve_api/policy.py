"""The KVServePolicy v1alpha1 as values: what operator, controller and profiler read of it.

The CRD (``crds/kvservepolicies.yaml``) is the contract with users; this module reads the same object from an API
server or a file, with the same defaults. A test holds the two equal on a real API server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from kvserve_api.errors import PolicyError
from kvserve_api.fields import Fields
from kvserve_api.model import Model
from kvserve_api.profile_set import DEFAULT_CLASS, NAME_PATTERN, NONE
from kvserve_api.profiling import Profiling, Text
from kvserve_api.quality import QualityBudget
from kvserve_api.task_check import TaskCheck, read_tasks

GROUP: Final = "kvserve.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "KVServePolicy"
PLURAL: Final = "kvservepolicies"


class Goal(StrEnum):
    """What to optimise among the profiles that keep quality budget and SLO."""

    MINIMIZE_LATENCY = "MinimizeLatency"
    MAXIMIZE_QUALITY = "MaximizeQuality"
    MINIMIZE_BYTES = "MinimizeBytes"


class Metric(StrEnum):
    """What an objective bounds."""

    TIME_TO_FIRST_TOKEN = "TimeToFirstToken"
    KV_TRANSFER_TIME = "KVTransferTime"


class Mode(StrEnum):
    """What the decisions do."""

    ACTIVE = "Active"
    SHADOW = "Shadow"
    PINNED = "Pinned"
    OFF = "Off"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One SLO: a percentile of a metric stays below a threshold."""

    name: str
    metric: Metric
    percentile: int
    threshold_ms: int

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read one objective."""
        objective = cls(
            name=fields.string("name", min_length=1, max_length=63),
            metric=Metric(fields.string("metric", choices=list(Metric))),
            percentile=fields.integer("percentile", 95),
            threshold_ms=fields.integer("thresholdMilliseconds", minimum=1, maximum=3_600_000),
        )
        if objective.percentile not in (50, 90, 95, 99):
            raise fields.fail("percentile", f"must be 50, 90, 95 or 99, got {objective.percentile}")
        fields.done()
        return objective


@dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """What a workload class wants of latency."""

    goal: Goal = Goal.MINIMIZE_LATENCY
    objectives: tuple[Objective, ...] = ()

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read an SLO."""
        objectives = tuple(
            Objective.read(item) for item in fields.children("objectives", [], max_items=8)
        )
        goal = Goal(fields.string("goal", Goal.MINIMIZE_LATENCY.value, choices=list(Goal)))
        keys = {(objective.metric, objective.percentile) for objective in objectives}
        if len(keys) < len(objectives):
            raise fields.fail("objectives", "metric and percentile must be unique")
        fields.done()
        return cls(goal=goal, objectives=objectives)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadClass:
    """A kind of traffic with its own SLO, quality budget and evaluation text.

    Attributes:
        name: What requests carry; ``default`` for those that carry nothing.
        slo: Its own, or the policy's.
        max_loss_bp: Quality budget, in basis points of expected perplexity growth.
        text: Evaluation text; None for the built-in corpus.
        tasks: What must still be answered rightly.
    """

    name: str
    slo: SLO
    max_loss_bp: int
    text: Text | None
    tasks: tuple[TaskCheck, ...] = ()

    @property
    def budget(self) -> QualityBudget:
        """What its profiles may lose."""
        return QualityBudget(
            max_loss_bp=self.max_loss_bp, tasks={t.name: t.max_loss_bp for t in self.tasks}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The pods of one role, by labels."""

    role: str
    match_labels: Mapping[str, str]

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read a target."""
        selector = fields.child("selector")
        target = cls(
            role=fields.string("role", choices=["Prefill", "Decode"]),
            match_labels=selector.mapping("matchLabels"),
        )
        if not target.match_labels:
            raise selector.fail("matchLabels", "must name at least one label")
        selector.done()
        fields.done()
        return target

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether a pod with these labels belongs to the target."""
        return all(labels.get(key) == value for key, value in self.match_labels.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """How decisions are made and what happens when nobody makes them.

    Attributes:
        mode: See `Mode`.
        pinned: The profile of mode Pinned.
        fallback: The profile when nothing else applies.
        on_controller_loss: ``HoldLastGood`` or ``Revert`` (to the fallback).
        lease_s: How long a table holds without news from the controller, in seconds.
        exploration_bp: What trying out profiles may be expected to cost, in basis points of the transfers' time.
    """

    mode: Mode = Mode.ACTIVE
    pinned: str | None = None
    fallback: str = NONE
    on_controller_loss: str = "HoldLastGood"
    lease_s: int = 60
    exploration_bp: int = 100

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the control section."""
        exploration = fields.child("exploration", {})
        failsafe = fields.child("failsafe", {})
        control = cls(
            mode=Mode(fields.string("mode", Mode.ACTIVE.value, choices=list(Mode))),
            pinned=fields.string("pinnedProfile", None, min_length=1, max_length=63),
            fallback=failsafe.string("fallbackProfile", NONE, max_length=63),
            on_controller_loss=failsafe.string(
                "onControllerLoss", "HoldLastGood", choices=["HoldLastGood", "Revert"]
            ),
            lease_s=failsafe.integer("leaseSeconds", 60, minimum=5, maximum=86_400),
            exploration_bp=exploration.integer("maxBasisPoints", 100, minimum=0, maximum=5000),
        )
        if (control.mode == Mode.PINNED) != (control.pinned is not None):
            raise fields.fail("pinnedProfile", "must be set if and only if mode is Pinned")
        exploration.done()
        failsafe.done()
        fields.done()
        return control


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One KVServePolicy.

    Attributes:
        namespace: Where it lives; ``default`` for a file that names none.
        name: Its name.
        generation: Grows with each change of the spec.
        model: The model.
        targets: The pods, by role.
        classes: The workload classes by name; always with ``default``.
        profiling: How the model is profiled.
        control: How decisions are made.
    """

    namespace: str
    name: str
    generation: int
    model: Model
    targets: tuple[Target, ...]
    classes: Mapping[str, WorkloadClass]
    profiling: Profiling
    control: Control

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @classmethod
    def from_object(cls, value: Any) -> Self:
        """Read a KVServePolicy object.

        Args:
            value: The parsed object, from an API server or a file.

        Raises:
            PolicyError: It can't be served; the error names the field.
        """
        document = Fields(value, error=PolicyError)
        document.string("apiVersion", choices=[API_VERSION])
        document.string("kind", choices=[KIND])
        metadata = document.child("metadata")
        spec = document.child("spec")
        spec.string("transport", "PrefillDecode", choices=["PrefillDecode"])
        targets = tuple(Target.read(item) for item in spec.children("targets", max_items=8))
        if sorted(target.role for target in targets) != ["Decode", "Prefill"]:
            raise spec.fail("targets", "must hold one Prefill and one Decode target")
        profiling = Profiling.read(spec.child("profiling", {}))
        policy = cls(
            namespace=metadata.string("namespace", "default", max_length=63),
            name=metadata.string("name", max_length=52),
            generation=metadata.integer("generation", 1, minimum=1),
            model=Model.read(spec.child("model")),
            targets=targets,
            classes=_classes(spec, profiling),
            profiling=profiling,
            control=Control.read(spec.child("control", {})),
        )
        for name in (policy.control.fallback, policy.control.pinned):
            if name in profiling.space.exclude.names:
                raise spec.fail(
                    "profiling.space.exclude.names", f"holds {name!r}, which control names"
                )
        spec.done()
        return policy


def _classes(spec: Fields, profiling: Profiling) -> dict[str, WorkloadClass]:
    slo = SLO.read(spec.child("slo", {}))
    quality = spec.child("quality", {})
    max_loss_bp = quality.integer("maxLossBasisPoints", 100, minimum=0, maximum=10_000)
    tasks = read_tasks(quality, ())
    quality.done()
    classes = {
        DEFAULT_CLASS: WorkloadClass(
            name=DEFAULT_CLASS, slo=slo, max_loss_bp=max_loss_bp, text=profiling.text, tasks=tasks
        )
    }
    for item in spec.children("workloads", [], max_items=16):
        name = item.string("name", max_length=63)
        if not NAME_PATTERN.fullmatch(name) or name in classes:
            raise item.fail("name", f"must be a unique DNS label other than default, got {name!r}")
        own_quality = item.child("quality", {})
        classes[name] = WorkloadClass(
            name=name,
            slo=SLO.read(item.child("slo")) if item.has("slo") else slo,
            max_loss_bp=own_quality.integer(
                "maxLossBasisPoints", max_loss_bp, minimum=0, maximum=10_000
            ),
            text=Text.read(item.child("evaluation")) if item.has("evaluation") else profiling.text,
            tasks=read_tasks(own_quality, tasks),
        )
        item.ignore("slo", "evaluation")
        own_quality.done()
        item.done()
    return classes
