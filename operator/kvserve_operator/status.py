"""The operator's part of a policy's status: how it should be, and what of it is there."""

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvserve_operator.drift import Runs
from kvserve_operator.findings import Finding, Sets
from kvserve_operator.observed import Observed
from kvserve_operator.reasons import OWN
from kvserve_operator.render import Run

_VOLATILE: Final = ("progress", "trialsCompleted", "trialsFailed", "message")
_MAX_MESSAGE: Final = 1024

Status = dict[str, Any]


def desired_status(
    observed: Observed, run: Run | None, sets: Sets, findings: Iterable[Finding], runs: Runs
) -> Status:
    """Return the operator's part of the status, as a server-side apply states it.

    Args:
        observed: What is.
        run: The run of the current inputs; None where the policy is not accepted.
        sets: The Pareto sets that matter.
        findings: The answers, for each of the operator's conditions.
        runs: The runs that drift has started.
    """
    status: Status = {
        "observedGeneration": observed.policy.generation,
        "conditions": [_condition(observed, finding) for finding in findings],
    }
    if run:
        status["profiling"] = _profiling(observed, run)
    if runs.total:
        status["drift"] = runs.to_json()
    if sets.in_force:
        status["pareto"] = {
            "configMapRef": {"name": sets.in_force.meta.name},
            "digest": sets.in_force.digest,
            "profiles": sets.in_force.profiles,
        }
    if observed.policy.policy:
        roles = sorted(target.role for target in observed.policy.policy.targets)
        status["targets"] = [{"role": r, "desired": observed.desired.get(r, 0)} for r in roles]
        status["synced"] = _synced(observed)
    return status


def owned_status(status: Mapping[str, Any]) -> Status:
    """Return the operator's part of a status, in the form of `desired_status`."""
    conditions = {c.get("type"): c for c in status.get("conditions") or []}
    targets = sorted(status.get("targets") or [], key=lambda target: str(target.get("role")))
    mine: Status = {
        "conditions": [dict(conditions[name]) for name in OWN if name in conditions],
        "targets": [
            {"role": t["role"], "desired": t["desired"]} for t in targets if "desired" in t
        ],
    }
    if not mine["targets"]:
        del mine["targets"]
    for key in ("observedGeneration", "profiling", "drift", "pareto", "synced"):
        if key in status:
            mine[key] = status[key]
    return mine


def only_progress(one: Status, other: Status) -> bool:
    """Tell whether two statuses differ in nothing but how far the run is."""
    return _steady(one) == _steady(other)


def _steady(status: Status) -> Status:
    profiling = status.get("profiling") or {}
    return status | {"profiling": {k: v for k, v in profiling.items() if k not in _VOLATILE}}


def _condition(observed: Observed, finding: Finding) -> dict[str, Any]:
    before: Mapping[str, Any] = next(
        (
            c
            for c in observed.policy.status.get("conditions") or []
            if c.get("type") == finding.condition
        ),
        {},
    )
    since = before.get("lastTransitionTime") if before.get("status") == finding.status else None
    return {
        "type": finding.condition,
        "status": finding.status,
        "observedGeneration": observed.policy.generation,
        "lastTransitionTime": since or _rfc3339(observed.now),
        "reason": finding.reason,
        "message": finding.message,
    }


def _profiling(observed: Observed, run: Run) -> dict[str, Any]:
    value: dict[str, Any] = {"inputsDigest": run.digest, "job": run.job}
    facts = next((r for r in observed.runs if r.meta.name == run.configmap), None)
    if facts and facts.progress and facts.meta.owner_uid == run.uid:
        progress = facts.progress
        value |= {
            "progress": str(progress)[:16],
            "trialsCompleted": progress.completed,
            "trialsFailed": progress.failed,
            "trialsTotal": progress.total,
        }
        if progress.allowed is not None and progress.known is not None:
            value |= {"strategiesAllowed": progress.allowed, "strategiesKnown": progress.known}
        if progress.message:
            value["message"] = progress.message[:_MAX_MESSAGE]
    job = next((j for j in observed.jobs if j.meta.name == run.job), None)
    if job and job.started:
        value["startTime"] = job.started
    if job and job.ended:
        value["completionTime"] = job.ended
    return value


def _synced(observed: Observed) -> str:
    reported = {t.get("role"): t for t in observed.policy.status.get("targets") or []}
    synced = sum(
        min(int(reported.get(role, {}).get("synced") or 0), desired)
        for role, desired in observed.desired.items()
    )
    return f"{synced}/{sum(observed.desired.values())}"


def _rfc3339(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
