"""Answers to a policy's conditions as values, and the sets that they are about."""

from dataclasses import dataclass
from typing import Final

from kvserve_operator.reasons import Condition, Reason
from kvserve_operator.sets import SetFacts

TRUE: Final = "True"
FALSE: Final = "False"
UNKNOWN: Final = "Unknown"
MAX_MESSAGE: Final = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The answer to one condition.

    Attributes:
        condition: Which.
        status: ``True``, ``False`` or ``Unknown``.
        reason: Why, in a word.
        message: Why, and what to do. Nothing that changes by itself: each change is a write.
        warning: A person should look at it.
    """

    condition: str
    status: str
    reason: str
    message: str
    warning: bool = False

    @property
    def true(self) -> bool:
        """The answer is yes."""
        return self.status == TRUE


@dataclass(frozen=True, kw_only=True, slots=True)
class Sets:
    """The Pareto sets that matter for a policy.

    Attributes:
        current: The one of the current inputs, usable or not; None if there is none.
        in_force: The usable one that serves; of earlier inputs while there is no usable current one.
    """

    current: SetFacts | None = None
    in_force: SetFacts | None = None


def finding(condition: Condition, status: str, reason: Reason, message: str) -> Finding:
    """Return the answer to one of the operator's own conditions."""
    return Finding(
        condition=condition.value,
        status=status,
        reason=reason.name,
        message=message[:MAX_MESSAGE],
        warning=reason.warning,
    )
