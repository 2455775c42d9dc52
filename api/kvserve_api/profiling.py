"""How a policy wants its model profiled: what may be tried, on which text, and when again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kvserve_api.fields import Fields
from kvserve_api.space_limits import SpaceLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Evaluation text in a ConfigMap of the policy's namespace."""

    config_map: str
    key: str

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read ``{configMapRef: {name, key}}``."""
        reference = fields.child("configMapRef")
        text = cls(
            config_map=reference.string("name", min_length=1, max_length=253),
            key=reference.string("key", "text", min_length=1, max_length=253),
        )
        reference.done()
        fields.done()
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDrift:
    """What happens when transfers are no longer what was profiled.

    Attributes:
        reprofile: A new run starts.
        min_interval_s: Least seconds from the end of one run to the start of the next.
    """

    reprofile: bool = True
    min_interval_s: int = 86_400

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the section."""
        wish = cls(
            reprofile=fields.boolean("reprofile", True),
            min_interval_s=fields.integer(
                "minIntervalSeconds", 86_400, minimum=5, maximum=31_536_000
            ),
        )
        fields.done()
        return wish


@dataclass(frozen=True, kw_only=True, slots=True)
class Profiling:
    """How the model is profiled.

    Attributes:
        suspend: Do not start runs, and stop a running one.
        max_trials: Most strategies to measure.
        parallelism: Pods that measure at the same time.
        active_deadline_s: Most seconds for a run.
        resources: Resource requirements of the Job's container, as Kubernetes has them.
        text: Evaluation text of the default class; None for the built-in corpus.
        space: Which strategies may be measured.
        on_drift: Whether drift starts a run.
    """

    suspend: bool = False
    max_trials: int = 64
    parallelism: int = 1
    active_deadline_s: int = 7200
    resources: Mapping[str, Any] | None = None
    text: Text | None = None
    space: SpaceLimits = field(default_factory=SpaceLimits)
    on_drift: OnDrift = field(default_factory=OnDrift)

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the profiling section."""
        budget = fields.child("budget", {})
        job = fields.child("job", {})
        profiling = cls(
            suspend=fields.boolean("suspend", False),
            max_trials=budget.integer("maxTrials", 64, minimum=4, maximum=4096),
            parallelism=job.integer("parallelism", 1, minimum=1, maximum=16),
            active_deadline_s=budget.integer(
                "activeDeadlineSeconds", 7200, minimum=60, maximum=604_800
            ),
            resources=job.mapping("resources", {}) or None,
            text=Text.read(fields.child("evaluation")) if fields.has("evaluation") else None,
            space=SpaceLimits.read(fields.child("space", {})),
            on_drift=OnDrift.read(fields.child("onDrift", {})),
        )
        fields.ignore("evaluation")
        for part in (budget, job, fields):
            part.done()
        return profiling
