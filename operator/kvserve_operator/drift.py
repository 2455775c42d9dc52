"""Whether transfers that are no longer what was profiled start a new profiling run: a pure function.

At most one run in each interval of the policy, counted from when the set in force was made. If the new set is drifted
from as well, measuring was no help (serving pods on other machines than the Job's are a usual cause), so each further
run waits twice as long, until a set has held for as long as that wait.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_operator.observed import Observed
from kvserve_operator.reasons import Condition
from kvserve_operator.sets import SetFacts

DRIFTED: Final = "Drifted"
"""The controller's reason for ProfilesAccurate being False."""
MAX_DOUBLINGS: Final = 6
MAX_MESSAGE: Final = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """The runs that drift has started; the status keeps it.

    Attributes:
        total: How many there were; part of the inputs of the next, so that it is another run.
        in_a_row: How many of them did not help, the latest included.
        inputs_digest: Digest of the inputs of the latest, or empty.
        message: What had drifted then, or empty.
    """

    total: int = 0
    in_a_row: int = 0
    inputs_digest: str = ""
    message: str = ""

    @classmethod
    def read(cls, status: Mapping[str, Any]) -> Self:
        """Read them from a policy's status."""
        value = status.get("drift") or {}
        return cls(
            total=int(value.get("runs") or 0),
            in_a_row=int(value.get("runsInARow") or 0),
            inputs_digest=str(value.get("inputsDigest") or ""),
            message=str(value.get("message") or ""),
        )

    def to_json(self) -> dict[str, Any]:
        """Return them as the status has them."""
        return {
            "runs": self.total,
            "runsInARow": self.in_a_row,
            "inputsDigest": self.inputs_digest,
            "message": self.message,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to be done about drift.

    Attributes:
        in_a_row: How many runs in a row the one to start now is; 0 to start none.
        due: When one may start; None if nothing has drifted, or the policy wants none.
        message: What has drifted, in the controller's words, or empty.
    """

    in_a_row: int = 0
    due: datetime.datetime | None = None
    message: str = ""


def judge(observed: Observed, in_force: SetFacts, runs: Runs) -> Verdict:
    """Tell whether drift starts a run now, or when it may.

    Args:
        observed: What is.
        in_force: The usable set of the current inputs.
        runs: The runs that drift has started so far.
    """
    policy = observed.policy.policy
    found = _drifted(observed)
    if policy is None or found is None or policy.profiling.suspend:
        return Verdict()
    since, message = found
    made = _time(in_force.meta.created)
    # a set that came after the drift is not what transfers drifted from: the controller has not taken it up yet
    if made is None or since < made or not policy.profiling.on_drift.reprofile:
        return Verdict(message=message)
    in_a_row = runs.in_a_row if runs.inputs_digest == in_force.meta.inputs_digest else 0
    wait_s = policy.profiling.on_drift.min_interval_s * 2 ** min(in_a_row, MAX_DOUBLINGS)
    due = made + datetime.timedelta(seconds=wait_s)
    if observed.now < due:
        return Verdict(due=due, message=message)
    held = in_a_row > 0 and since >= due
    return Verdict(in_a_row=1 if held else in_a_row + 1, due=due, message=message)


def _drifted(observed: Observed) -> tuple[datetime.datetime, str] | None:
    """Return since when transfers have drifted, and what; None if they have not."""
    for condition in observed.policy.status.get("conditions") or []:
        if condition.get("type") != Condition.PROFILES_ACCURATE:
            continue
        if (condition.get("status"), condition.get("reason")) != ("False", DRIFTED):
            return None
        since = _time(condition.get("lastTransitionTime", ""))
        message = str(condition.get("message", "")).partition("; costs are corrected")[0]
        return None if since is None else (since, message[:MAX_MESSAGE])
    return None


def _time(text: str) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
