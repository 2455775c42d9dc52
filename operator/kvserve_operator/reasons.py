"""The catalogue of reasons that conditions and events of the operator carry.

Each has a section of its own in ``docs/operations.md``; a test holds the two equal. A reason is a promise: scripts
and alerts match on it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Condition(StrEnum):
    """The conditions of a policy; the last three are the controller's."""

    ACCEPTED = "Accepted"
    TARGETS_RESOLVED = "TargetsResolved"
    PROFILED = "Profiled"
    QUALITY_FEASIBLE = "QualityFeasible"
    READY = "Ready"
    PROGRAMMED = "Programmed"
    OBJECTIVES_MET = "ObjectivesMet"
    PROFILES_ACCURATE = "ProfilesAccurate"


OWN: Final = (
    Condition.ACCEPTED,
    Condition.TARGETS_RESOLVED,
    Condition.PROFILED,
    Condition.QUALITY_FEASIBLE,
    Condition.READY,
)
"""The conditions the operator writes, in the order it writes them."""


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason.

    Attributes:
        name: What the condition or event carries.
        warning: Something a person should look at; events of it are warnings.
    """

    name: str
    warning: bool = False

    @property
    def anchor(self) -> str:
        """Its section in ``docs/operations.md``."""
        return self.name.lower()


# Accepted
ACCEPTED: Final = Reason("Accepted")
INVALID_POLICY: Final = Reason("InvalidPolicy", warning=True)
EVALUATION_MISSING: Final = Reason("EvaluationMissing", warning=True)
CONFLICTED: Final = Reason("Conflicted", warning=True)

# TargetsResolved
PODS_FOUND: Final = Reason("PodsFound")
NO_PODS: Final = Reason("NoPods")

# Profiled
PROFILED: Final = Reason("Profiled")
PROFILING: Final = Reason("Profiling")
REPROFILING: Final = Reason("Reprofiling")
SUSPENDED: Final = Reason("Suspended")
NOT_ACCEPTED: Final = Reason("NotAccepted")
BAD_INPUT: Final = Reason("BadInput", warning=True)
INFEASIBLE: Final = Reason("Infeasible", warning=True)
UNSUPPORTED: Final = Reason("Unsupported", warning=True)
DEADLINE_EXCEEDED: Final = Reason("DeadlineExceeded", warning=True)
OUT_OF_MEMORY: Final = Reason("OutOfMemory", warning=True)
JOB_FAILED: Final = Reason("JobFailed", warning=True)
IMAGE_UNAVAILABLE: Final = Reason("ImageUnavailable", warning=True)
CONTAINER_NOT_CREATED: Final = Reason("ContainerNotCreated", warning=True)
UNSCHEDULABLE: Final = Reason("Unschedulable", warning=True)
RESULT_INVALID: Final = Reason("ResultInvalid", warning=True)
NAME_TAKEN: Final = Reason("NameTaken", warning=True)
WRITE_REFUSED: Final = Reason("WriteRefused", warning=True)

# QualityFeasible
FEASIBLE: Final = Reason("Feasible")
BUDGET_TOO_TIGHT: Final = Reason("BudgetTooTight", warning=True)
NO_PROFILES: Final = Reason("NoProfiles")

# Ready
SERVING: Final = Reason("Serving")
NOT_PROGRAMMED: Final = Reason("NotProgrammed", warning=True)

# Events only
PROFILING_STARTED: Final = Reason("ProfilingStarted")
RUN_SUPERSEDED: Final = Reason("RunSuperseded")
RUN_RETRIED: Final = Reason("RunRetried")
DRIFT_REPROFILING: Final = Reason("DriftReprofiling", warning=True)

CATALOGUE: Final[tuple[Reason, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Reason)
)
"""Every reason, in the order above."""
