"""The inputs of a profiling run, as the operator or the command line gives them.

They are identified by the digest of what decides the result. Quality budgets are not part of it: they only say which of
the measured profiles may be used, so that editing a budget needs no new run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.canonical import canonical_json, digest
from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.policy import Policy
from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_api.quality import QualityBudget
from kvserve_api.space_limits import SpaceLimits

SCHEMA: Final = "kvserve.io/run/v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskInputs:
    """What a run needs to know of a task.

    Attributes:
        source: Where its items are, see `kvserve_api.task_check.TaskCheck.source`.
        items: Most items to answer.
        max_loss_bp: The share of answers that may be lost, in basis points.
        digest: Digest of the document with the items; None if only the run can read it, or it is built in.
    """

    source: str
    items: int
    max_loss_bp: int
    digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the task as an object."""
        return {
            "source": self.source,
            "items": self.items,
            "max_loss_bp": self.max_loss_bp,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a task."""
        task = cls(
            source=fields.string("source"),
            items=fields.integer("items", minimum=1),
            max_loss_bp=fields.integer("max_loss_bp", minimum=0, maximum=10_000),
            digest=fields.string("digest", None, max_length=80),
        )
        fields.done()
        return task


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassInputs:
    """What a run needs to know of a workload class.

    Attributes:
        max_loss_bp: The quality budget, in basis points.
        text_digest: Digest of its evaluation text; None for the built-in corpus.
        tasks: What must still be answered rightly, by name.
    """

    max_loss_bp: int
    text_digest: str | None = None
    tasks: Mapping[str, TaskInputs] = field(default_factory=dict)

    @property
    def budget(self) -> QualityBudget:
        """What the class's profiles may lose."""
        tasks = {name: task.max_loss_bp for name, task in self.tasks.items()}
        return QualityBudget(max_loss_bp=self.max_loss_bp, tasks=tasks)

    def to_json(self) -> dict[str, Any]:
        """Return the class as an object; without tasks, as if there was no such thing."""
        value: dict[str, Any] = {"max_loss_bp": self.max_loss_bp, "text_digest": self.text_digest}
        if self.tasks:
            value["tasks"] = {name: task.to_json() for name, task in self.tasks.items()}
        return value

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a class."""
        tasks = fields.child("tasks", {})
        inputs = cls(
            max_loss_bp=fields.integer("max_loss_bp", minimum=0, maximum=10_000),
            text_digest=fields.string("text_digest", None, max_length=80),
            tasks={name: TaskInputs.from_json(tasks.child(name)) for name in tasks.mapping_of()},
        )
        fields.done()
        return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What to profile.

    Attributes:
        policy: ``namespace/name`` of the policy.
        model: Hub id, or the name of what lies at ``model_path``.
        revision: Revision on the hub, or empty.
        model_source: Where a model that is not from the hub is, in words that change when it does; empty for the hub.
        classes: The workload classes by name; always with ``default``.
        max_trials: Most strategies to measure.
        image: The image of the profiler, because another version may measure differently; empty outside a cluster.
        seed: Of everything random.
        artifacts: URL of the store that calibration bundles go to; empty without one, then nothing is calibrated.
        space: Which strategies may be measured.
        parallelism: Pods that measure at the same time; batches of the search are as large.
        drift_runs: How many runs of the policy were started because transfers were not what was profiled, this one
            included; another number is another run.
    """

    policy: str
    model: str
    revision: str
    model_source: str
    classes: Mapping[str, ClassInputs]
    max_trials: int
    image: str = ""
    seed: int = 0
    artifacts: str = ""
    space: SpaceLimits = field(default_factory=SpaceLimits)
    parallelism: int = 1
    drift_runs: int = 0

    def __post_init__(self) -> None:
        if DEFAULT_CLASS not in self.classes:
            raise SpecError("classes", f"must hold the class {DEFAULT_CLASS!r}")

    @property
    def digest(self) -> str:
        """The digest of all that decides the result."""
        value = self.to_json()
        for inputs in value["classes"].values():
            for part in (inputs, *inputs.get("tasks", {}).values()):
                del part["max_loss_bp"]
        return digest(value)

    def to_json(self) -> dict[str, Any]:
        """Return the inputs as an object; without a store or limits, as if there was no such thing."""
        extra: dict[str, Any] = {"artifacts": self.artifacts} if self.artifacts else {}
        if not self.space.whole:
            extra["space"] = self.space.to_json()
        if self.parallelism > 1:
            extra["parallelism"] = self.parallelism
        if self.drift_runs:
            extra["drift_runs"] = self.drift_runs
        return extra | {
            "schema": SCHEMA,
            "policy": self.policy,
            "model": self.model,
            "revision": self.revision,
            "model_source": self.model_source,
            "classes": {name: c.to_json() for name, c in self.classes.items()},
            "max_trials": self.max_trials,
            "image": self.image,
            "seed": self.seed,
        }

    def canonical(self) -> bytes:
        """Return the canonical JSON."""
        return canonical_json(self.to_json())

    @classmethod
    def of_policy(
        cls,
        policy: Policy,
        *,
        text_digests: Mapping[str, str | None],
        task_digests: Mapping[tuple[str, str], str | None] | None = None,
        image: str = "",
        artifacts: str = "",
        drift_runs: int = 0,
    ) -> Self:
        """Return the inputs of a policy's run.

        Args:
            policy: The policy.
            text_digests: For each workload class the digest of its evaluation text, None for the built-in corpus.
            task_digests: For each workload class and name of a task in a ConfigMap the digest of its items.
            image: The image of the profiler.
            artifacts: URL of the artifact store, or empty.
            drift_runs: How many of the policy's runs drift has started.
        """
        digests = task_digests or {}
        source = policy.model.source
        return cls(
            policy=policy.key,
            model=policy.model.name,
            revision=policy.model.revision,
            model_source=f"pvc:{source.claim_name}/{source.path}" if source else "",
            classes={
                name: ClassInputs(
                    max_loss_bp=c.max_loss_bp,
                    text_digest=text_digests.get(name),
                    tasks={
                        task.name: TaskInputs(
                            source=task.source,
                            items=task.items,
                            max_loss_bp=task.max_loss_bp,
                            digest=digests.get((name, task.name)),
                        )
                        for task in c.tasks
                    },
                )
                for name, c in policy.classes.items()
            },
            max_trials=policy.profiling.max_trials,
            image=image,
            artifacts=artifacts,
            space=policy.profiling.space,
            parallelism=policy.profiling.parallelism,
            drift_runs=drift_runs,
        )

    @classmethod
    def parse(cls, document: bytes) -> Self:
        """Read the inputs.

        Raises:
            SpecError: They are not JSON, or a key is missing, unknown or of the wrong type.
        """
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise SpecError("inputs", f"is not JSON: {error}") from error
        fields = Fields(value)
        fields.string("schema", choices=[SCHEMA])
        table = fields.child("classes")
        classes = {name: ClassInputs.from_json(table.child(name)) for name in table.mapping_of()}
        inputs = cls(
            policy=fields.string("policy", max_length=256),
            model=fields.string("model", max_length=512),
            revision=fields.string("revision", "", max_length=128),
            model_source=fields.string("model_source", ""),
            classes=classes,
            max_trials=fields.integer("max_trials", minimum=1, maximum=4096),
            image=fields.string("image", ""),
            seed=fields.integer("seed", 0, minimum=0),
            artifacts=fields.string("artifacts", "", max_length=2048),
            space=SpaceLimits.read(fields.child("space", {})),
            parallelism=fields.integer("parallelism", 1, minimum=1, maximum=16),
            drift_runs=fields.integer("drift_runs", 0, minimum=0),
        )
        fields.done()
        return inputs
