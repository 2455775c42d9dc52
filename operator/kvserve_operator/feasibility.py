"""Whether each workload class has profiles within its quality budget: a pure function."""

import math

from kvserve_api.policy import Policy, WorkloadClass
from kvserve_operator import reasons
from kvserve_operator.findings import FALSE, TRUE, UNKNOWN, Finding, finding
from kvserve_operator.reasons import Condition
from kvserve_operator.sets import ProfileFacts, SetFacts


def quality_feasible(policy: Policy | None, in_force: SetFacts | None) -> Finding:
    """Tell whether each workload class has a profile other than ``none`` within its budget."""
    condition = Condition.QUALITY_FEASIBLE
    if policy is None or in_force is None:
        text = "there is no Pareto set yet; see the condition Profiled"
        return finding(condition, UNKNOWN, reasons.NO_PROFILES, text)
    short = []
    for name, workload in policy.classes.items():
        profiles = in_force.losses.get(name, in_force.losses["default"])
        if not any(workload.budget.admits(profile) for profile in profiles):
            short.append(_shortfall(workload, profiles))
    if short:
        text = "; ".join(short) + "; transfers stay uncompressed"
        return finding(condition, FALSE, reasons.BUDGET_TOO_TIGHT, text)
    text = "each workload class has profiles within its quality budget"
    return finding(condition, TRUE, reasons.FEASIBLE, text)


def _shortfall(workload: WorkloadClass, profiles: tuple[ProfileFacts, ...]) -> str:
    """Return which budget a workload class would need for its least lossy profile."""
    name = workload.name
    field = "spec.quality" if name == "default" else f"spec.workloads[{name}].quality"
    if not profiles:
        return f"class {name} has no profile but none: every other is worse in all"
    within = [p for p in profiles if p.loss_upper_bp <= workload.max_loss_bp]
    if not within:
        best = min(profiles, key=lambda p: (p.loss_upper_bp, p.name))
        return (
            f"class {name}: the least loss is {best.loss_upper_bp:.1f} basis points, of profile {best.name}; "
            f"set {field}.maxLossBasisPoints to {math.ceil(best.loss_upper_bp)} or more to use it"
        )
    best = min(
        within, key=lambda p: (len(workload.budget.failed_tasks(p)), p.loss_upper_bp, p.name)
    )
    return (
        f"class {name}: of profile {best.name}, {workload.budget.told(best)}; "
        f"raise maxItems or maxLossBasisPoints of {field}.tasks"
    )
