"""What the controller publishes about a policy: a pure function of what it knows."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from kvserve_api.policy import Mode, Policy, WorkloadClass
from kvserve_api.profile_set import DEFAULT_CLASS, ParetoSet, Profile
from kvserve_api.table import DecisionTable, Role
from kvserve_controller.counts import Counts
from kvserve_controller.program import Program
from kvserve_controller.window import WINDOW_S

PROGRAMMED: Final = "Programmed"
OBJECTIVES_MET: Final = "ObjectivesMet"
PROFILES_ACCURATE: Final = "ProfilesAccurate"
MAX_MESSAGE: Final = 1024


class Reason(StrEnum):
    """Every reason of the controller's conditions that is not an error's own; explained in docs/controller.md."""

    ACKNOWLEDGED = "Acknowledged"
    PENDING = "Pending"
    REJECTED = "Rejected"
    NOT_CONNECTED = "NotConnected"
    NO_PROFILES = "NoProfiles"
    MET = "Met"
    BREACHED = "Breached"
    NO_OBJECTIVES = "NoObjectives"
    NO_TRAFFIC = "NoTraffic"
    ACCURATE = "Accurate"
    DRIFTED = "Drifted"


def status(program: Program, counts: Mapping[Role, Counts], now_s: float) -> dict[str, Any]:
    """Return the controller's fields of a policy's status, as JSON.

    Conditions carry no ``lastTransitionTime`` yet: `stamp` adds it.

    Args:
        program: The policy and what was derived from it.
        counts: How the pods of each role stand.
        now_s: Monotonic seconds.
    """
    objectives = _objectives(program, now_s)
    value: dict[str, Any] = {
        "conditions": [
            _condition(program, PROGRAMMED, *_programmed(program, counts)),
            _condition(program, OBJECTIVES_MET, *_objectives_met(program, objectives)),
            _condition(program, PROFILES_ACCURATE, *_accurate(program)),
        ],
        "targets": [
            {
                "role": role.value,
                "connected": count.connected,
                "synced": count.synced,
                "stale": count.stale,
                "rejected": count.rejected,
            }
            | ({"message": count.message[:MAX_MESSAGE]} if count.message else {})
            for role, count in counts.items()
        ],
        "objectives": objectives,
        "history": [switch.to_json() for switch in program.activity.history],
    }
    if program.table is not None and program.activity.history:
        value["activeProfile"] = _active(program, program.table)
    return value


def stamp(new: Mapping[str, Any], old: Mapping[str, Any], now: str) -> dict[str, Any]:
    """Return a status whose conditions say since when: of ``old`` where the answer is the same, else ``now``."""
    before = {c.get("type"): c for c in old.get("conditions", [])}
    conditions = []
    for condition in new["conditions"]:
        known = before.get(condition["type"], {})
        same = known.get("status") == condition["status"]
        since = known.get("lastTransitionTime", now) if same else now
        conditions.append({**condition, "lastTransitionTime": since})
    return {**new, "conditions": conditions}


def _condition(
    program: Program, kind: str, answer: bool | None, reason: str, message: str
) -> dict[str, Any]:
    return {
        "type": kind,
        "status": "Unknown" if answer is None else str(answer),
        "observedGeneration": program.generation,
        "reason": reason,
        "message": message[:MAX_MESSAGE],
    }


def _programmed(program: Program, counts: Mapping[Role, Counts]) -> tuple[bool | None, str, str]:
    table = program.table
    if program.problem is not None:
        kept = f"; table {table.version} stays in force" if table is not None else ""
        return False, program.problem.reason, f"{program.problem}{kept}"
    if table is None:
        return False, Reason.NO_PROFILES, "no Pareto set yet: the model is still to be profiled"
    missing = [role.value for role, count in counts.items() if not count.connected]
    if missing:
        return (
            False,
            Reason.NOT_CONNECTED,
            (
                f"no {' and no '.join(missing)} pod is connected: start vLLM with the KVServeConnector, its"
                " control_endpoint set to this controller, and the labels of spec.targets"
            ),
        )
    if any(count.rejected for count in counts.values()):
        return (
            False,
            Reason.REJECTED,
            (
                f"table {table.version} was refused, the pods keep their last good one: "
                + "; ".join(count.message for count in counts.values() if count.message)
            ),
        )
    stale = sum(count.stale for count in counts.values())
    total = sum(count.connected for count in counts.values())
    if stale:
        return (
            None,
            Reason.PENDING,
            f"{stale} of {total} pods have not answered {table.version} yet",
        )
    return (
        True,
        Reason.ACKNOWLEDGED,
        (f"all {total} connected pods acknowledged table {table.version}{_remark(program, table)}"),
    )


def _remark(program: Program, table: DecisionTable) -> str:
    """Say what a user may not expect of the table in force."""
    if table.mode is Mode.SHADOW:
        return "; mode Shadow: decisions are only reported"
    if table.mode is Mode.OFF:
        return "; mode Off: transfers stay uncompressed"
    over = _over_budget(table.pinned, program.policy, program.pareto)
    if over:
        return f"; pinned profile {table.pinned!r} exceeds the quality budget of {', '.join(over)}"
    return ""


def _over_budget(name: str | None, policy: Policy | None, pareto: ParetoSet | None) -> list[str]:
    """Return the workload classes whose quality budget a profile exceeds."""
    if name is None or policy is None or pareto is None:
        return []
    return [
        f"workload class {workload.name!r} ({told})"
        for workload in policy.classes.values()
        for profile in pareto.profiles(workload.name)
        if profile.name == name and (told := _excess(workload, profile))
    ]


def _excess(workload: WorkloadClass, profile: Profile) -> str:
    """Return what a profile loses beyond the budget of a class; empty if nothing."""
    over = profile.loss_upper_bp > workload.max_loss_bp
    loss = f"{profile.loss_upper_bp:.0f} > {workload.max_loss_bp}" if over else ""
    return "; ".join(part for part in (loss, workload.budget.told(profile)) if part)


def _active(program: Program, table: DecisionTable) -> dict[str, Any]:
    switch = program.activity.history[0]
    value: dict[str, Any] = {
        "name": switch.after,
        "version": str(table.version),
        "since": switch.time,
    }
    candidate = table.candidates.get(switch.after)
    if candidate is not None:
        value["compressionRatio"] = f"{candidate.ratio:.1f}x"
        value["lossBasisPoints"] = math.ceil(candidate.loss_upper_bp)
    return value


def _objectives(program: Program, now_s: float) -> list[dict[str, Any]]:
    values = []
    for workload in program.policy.classes.values() if program.policy is not None else ():
        for objective in workload.slo.objectives:
            own = workload.name == DEFAULT_CLASS
            value: dict[str, Any] = {
                "name": objective.name if own else f"{workload.name}/{objective.name}",
                "thresholdMilliseconds": objective.threshold_ms,
                "windowSeconds": int(WINDOW_S),
            }
            seen_s = program.window.percentile_s(
                workload.name, objective.metric, objective.percentile, now_s
            )
            if seen_s is not None:
                value["observedMilliseconds"] = _two_digits(seen_s * 1000)
                value["met"] = seen_s * 1000 <= objective.threshold_ms
            values.append(value)
    return values


def _objectives_met(
    program: Program, objectives: list[dict[str, Any]]
) -> tuple[bool | None, str, str]:
    if not objectives:
        return True, Reason.NO_OBJECTIVES, "the policy sets no latency objective"
    breached = [o for o in objectives if o.get("met") is False]
    if breached:
        told = ", ".join(
            f"{o['name']} ({o['observedMilliseconds']} > {o['thresholdMilliseconds']} ms)"
            for o in breached
        )
        return (
            False,
            Reason.BREACHED,
            (
                f"not kept over {WINDOW_S:.0f} s: {told}; the fastest profiles within the quality budget are"
                " in use: loosen the objective or the budget, or give the link more bandwidth"
            ),
        )
    if any("met" in o for o in objectives):
        return True, Reason.MET, f"every objective with traffic was kept over {WINDOW_S:.0f} s"
    return None, Reason.NO_TRAFFIC, f"no transfer was reported in the last {WINDOW_S:.0f} s"


def _accurate(program: Program) -> tuple[bool | None, str, str]:
    """Tell whether transfers are as the profiles say, within what is corrected without a word."""
    drifted = program.drifted
    if drifted:
        told = "; ".join(str(each) for each in drifted[:3])
        more = f" and {len(drifted) - 3} more" if len(drifted) > 3 else ""
        return (
            False,
            Reason.DRIFTED,
            (
                f"{told}{more}; costs are corrected, but what was not tried may be misjudged: in a cluster the operator"
                " profiles again as spec.profiling.onDrift says, elsewhere kvserve profile does"
            ),
        )
    if program.learned_from == 0:
        return None, Reason.NO_TRAFFIC, "no transfer has been compared with its profile yet"
    return True, Reason.ACCURATE, "transfers take about what was profiled"


def _two_digits(value: float) -> int:
    """Round to two significant digits, so that noise doesn't rewrite the status."""
    if value < 1:
        return round(value)
    digits = math.floor(math.log10(value))
    return round(round(value, min(0, 1 - digits)))
