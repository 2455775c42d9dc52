"""How far a profiling run is, as the run writes it and the operator reads it."""

import json
from dataclasses import dataclass
from typing import Any, Self

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        completed: Strategies measured.
        failed: Strategies that could not be measured.
        total: Strategies to measure in all.
        message: What the run ended with, or is doing, for people.
        allowed: Strategies that the policy's limits leave; None without limits, and before they are known.
        known: Strategies that there are without limits; None as ``allowed``.
    """

    completed: int = 0
    failed: int = 0
    total: int = 0
    message: str = ""
    allowed: int | None = None
    known: int | None = None

    def __str__(self) -> str:
        """Return ``37/64``."""
        return f"{self.completed + self.failed}/{self.total}"

    def to_json(self) -> dict[str, Any]:
        """Return the progress as an object."""
        value: dict[str, Any] = {
            "completed": self.completed,
            "failed": self.failed,
            "total": self.total,
            "message": self.message,
        }
        counts = (("allowed", self.allowed), ("known", self.known))
        return value | {key: count for key, count in counts if count is not None}

    @classmethod
    def parse(cls, document: str) -> Self:
        """Read the progress.

        Raises:
            SpecError: It is not JSON, or a key is missing, unknown or of the wrong type.
        """
        try:
            fields = Fields(json.loads(document), "progress")
        except (ValueError, RecursionError) as error:
            raise SpecError("progress", f"is not JSON: {error}") from error
        progress = cls(
            completed=fields.integer("completed", minimum=0),
            failed=fields.integer("failed", minimum=0),
            total=fields.integer("total", minimum=0),
            message=fields.string("message", "", max_length=1024),
            allowed=fields.integer("allowed", None, minimum=0),
            known=fields.integer("known", None, minimum=0),
        )
        fields.done()
        return progress
