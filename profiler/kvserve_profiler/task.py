"""What a profiling run is to do."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvserve_api.run import RunInputs
from kvserve_profiler.candidates import Candidate, Grid
from kvserve_profiler.cost import device_kind
from kvserve_profiler.identity import Identity, identify
from kvserve_profiler.model import Source
from kvserve_profiler.narrowing import check, narrow
from kvserve_profiler.settings import Settings
from kvserve_profiler.tasks.items import TaskSet
from kvserve_profiler.texts import Text, unique
from kvserve_profiler.trials import TrialLog
from kvserve_strategies.bundle import Bundle

BUNDLE_KEY: Final = "bundle"
"""In the basis of a trial log: the digest of the calibration bundle that its trials used."""
TOOLS: Final = ("kvserve", "torch", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to profile, and how.

    Attributes:
        inputs: What was asked for.
        source: Where the model is.
        texts: The evaluation text of each workload class.
        counts: How many strategies the limits leave, and of how many; None without limits, and before they are known.
        checks: For each workload class what must still be answered rightly, by the task's name.
        space: The strategies that have names of their own and may be measured; a search begins with them.
        grid: Returns the strategy space around them, not yet limited; None to measure no others.
        settings: How to measure.
        identity: Of the model.
        device: What the costs are measured on.
        calibration: What the bundle is made with; empty without one.
        bundle: The model's calibration; None until it was made, and if there is none.
        uncalibrated: Why there is none, for people; empty otherwise.
    """

    inputs: RunInputs
    source: Source
    texts: Mapping[str, Text]
    space: tuple[Candidate, ...]
    grid: Grid | None = None
    settings: Settings
    identity: Identity
    device: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    bundle: Bundle | None = None
    uncalibrated: str = ""
    checks: Mapping[str, Mapping[str, TaskSet]] = field(default_factory=dict)
    counts: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        inputs: RunInputs,
        source: Source,
        texts: Mapping[str, Text],
        space: Sequence[Candidate],
        settings: Settings,
        grid: Grid | None = None,
    ) -> "Task":
        """Return a task on this machine.

        Raises:
            SpecError: There is no model, or the limits of the space name what there is not.
            UnsupportedError: The model has no plain KV cache.
        """
        check(inputs.space)
        return cls(
            inputs=inputs,
            source=source,
            texts=texts,
            space=narrow(inputs.space, space),
            grid=grid,
            settings=settings,
            identity=identify(source),
            device=device_kind(),
        )

    def checked_by(self, checks: Mapping[str, Mapping[str, TaskSet]]) -> "Task":
        """Return the task with what its result must still answer rightly."""
        return replace(self, checks=checks)

    def calibrated_by(self, recipe: Mapping[str, Any]) -> "Task":
        """Return the task with what its bundle will be made with."""
        return replace(self, calibration=recipe)

    def with_bundle(self, bundle: Bundle) -> "Task":
        """Return the task with the model's calibration."""
        return replace(self, bundle=bundle)

    def without_bundle(self, why: str) -> "Task":
        """Return the task without the strategies that need a calibration."""
        space = tuple(candidate for candidate in self.space if not candidate.calibrated)
        return replace(self, space=space, uncalibrated=why)

    @property
    def total(self) -> int:
        """How many strategies the run measures at most."""
        if self.grid is not None:
            return self.inputs.max_trials
        return min(self.inputs.max_trials, len(self.space))

    @property
    def budgets_bp(self) -> dict[str, float]:
        """For each text, by digest in order, the largest quality budget of the classes that it stands for."""
        budgets: dict[str, float] = {}
        for name, text in self.texts.items():
            wanted = float(self.inputs.classes[name].max_loss_bp)
            budgets[text.digest] = max(wanted, budgets.get(text.digest, 0.0))
        return dict(sorted(budgets.items()))

    def log(self) -> TrialLog:
        """Return the empty trial log of the task."""
        calibration: dict[str, Any] = (
            {} if self.bundle is None else {BUNDLE_KEY: self.bundle.digest}
        )
        if self.calibration:
            calibration["calibration"] = dict(self.calibration)
        return TrialLog(
            basis=calibration
            | {
                "fingerprint": self.identity.fingerprint,
                "weights": self.identity.weights,
                "texts": sorted(unique(self.texts)),
                "settings": self.settings.to_json(),
                "device": self.device,
                "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
            }
        )
