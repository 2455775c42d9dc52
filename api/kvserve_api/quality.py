"""What a workload class asks of a profile's quality: a budget of divergence, and budgets of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

from kvserve_api.fields import Fields

BASIS_POINTS: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """What a strategy does to the answers of a task.

    Attributes:
        items: Items answered.
        exact: Share answered rightly with the exact cache.
        compressed: Share answered rightly with the compressed one.
        loss_upper_bp: One-sided upper confidence limit of the share lost, in basis points, 100 of which are one
            percentage point.
    """

    items: int
    exact: float
    compressed: float
    loss_upper_bp: float

    @property
    def loss_bp(self) -> float:
        """The share lost, in basis points; negative if compression helped by chance."""
        return (self.exact - self.compressed) * BASIS_POINTS

    def to_json(self) -> dict[str, Any]:
        """Return the score as an object."""
        return {
            "items": self.items,
            "exact": float(self.exact),
            "compressed": float(self.compressed),
            "loss_upper_bp": float(self.loss_upper_bp),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a score."""
        score = cls(
            items=fields.integer("items", minimum=1),
            exact=fields.number("exact", minimum=0, maximum=1),
            compressed=fields.number("compressed", minimum=0, maximum=1),
            loss_upper_bp=fields.number("loss_upper_bp", minimum=0, maximum=BASIS_POINTS),
        )
        fields.done()
        return score


class Measured(Protocol):
    """What is known of a profile's quality."""

    @property
    def loss_upper_bp(self) -> float:
        """Upper limit of the expected growth of perplexity, in basis points."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether it changes nothing."""
        ...

    @property
    def tasks(self) -> Mapping[str, TaskScore]:
        """What it does to the answers of tasks, by the task's name."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityBudget:
    """What a profile may lose in a workload class. All of it must be kept, and must have been shown to be.

    Attributes:
        max_loss_bp: Expected growth of perplexity, in basis points.
        tasks: For each task by name the share of answers, in basis points.
    """

    max_loss_bp: float
    tasks: Mapping[str, int] = field(default_factory=dict)

    def admits(self, profile: Measured) -> bool:
        """Tell whether a profile keeps the budget."""
        return profile.loss_upper_bp <= self.max_loss_bp and not self.failed_tasks(profile)

    def failed_tasks(self, profile: Measured) -> dict[str, TaskScore | None]:
        """Return the tasks whose budget a profile is not known to keep, with its score; None if it has none."""
        if profile.lossless:
            return {}
        scores = {name: profile.tasks.get(name) for name in self.tasks}
        return {
            name: score
            for name, score in scores.items()
            if score is None or score.loss_upper_bp > self.tasks[name]
        }

    def told(self, profile: Measured) -> str:
        """Return what a profile loses of tasks beyond the budget, for people; empty if nothing."""
        return ", ".join(
            f"of task {name} {self.tasks[name]} basis points were allowed and "
            + (
                "none were measured"
                if score is None
                else f"{score.loss_upper_bp:.0f} may be lost ({score.items} items)"
            )
            for name, score in self.failed_tasks(profile).items()
        )
