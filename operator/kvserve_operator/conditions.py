"""The answers the operator gives about a policy: pure functions from what is observed to findings."""

import datetime

from kvserve_api.names import ExitCode
from kvserve_operator import reasons
from kvserve_operator.conflicts import self_overlap
from kvserve_operator.drift import Runs, Verdict
from kvserve_operator.findings import FALSE, MAX_MESSAGE, TRUE, UNKNOWN, Finding, Sets, finding
from kvserve_operator.jobs import JobFacts, exit_code
from kvserve_operator.observed import Observed
from kvserve_operator.reasons import Condition, Reason
from kvserve_operator.render import Run


def accepted(observed: Observed) -> Finding:
    """Tell whether the policy can be worked on at all."""
    facts = observed.policy
    if facts.policy is None:
        return finding(Condition.ACCEPTED, FALSE, reasons.INVALID_POLICY, facts.problem)
    if self_overlap(facts.policy):
        text = (
            "spec.targets: every pod of one role is also selected for the other; "
            "give them labels that differ"
        )
        return finding(Condition.ACCEPTED, FALSE, reasons.INVALID_POLICY, text)
    if observed.winner:
        text = (
            f"spec.targets: the older policy {observed.winner} selects the same pods; "
            "delete one of the two or narrow its selectors"
        )
        return finding(Condition.ACCEPTED, FALSE, reasons.CONFLICTED, text)
    missing = [
        f"evaluation text of workload class {name}: {text.problem}"
        for name, text in observed.texts.items()
        if text.problem
    ] + [
        f"items of task {task} of workload class {name}: {text.problem}"
        for (name, task), text in observed.tasks.items()
        if text.problem
    ]
    if missing:
        text = "; ".join(missing)
        return finding(Condition.ACCEPTED, FALSE, reasons.EVALUATION_MISSING, text)
    return finding(Condition.ACCEPTED, TRUE, reasons.ACCEPTED, "the policy can be served")


def targets_resolved(observed: Observed) -> Finding:
    """Tell whether there are pods of each role."""
    policy = observed.policy.policy
    if policy is None:
        text = "the targets can't be read; see the condition Accepted"
        return finding(Condition.TARGETS_RESOLVED, UNKNOWN, reasons.NOT_ACCEPTED, text)
    empty = [t for t in policy.targets if not observed.desired.get(t.role)]
    if empty:
        wanted = " and no ".join(
            f"{t.role} pod with {','.join(f'{k}={v}' for k, v in sorted(t.match_labels.items()))}"
            for t in empty
        )
        text = f"there is no {wanted} in namespace {policy.namespace}"
        return finding(Condition.TARGETS_RESOLVED, FALSE, reasons.NO_PODS, text)
    return finding(
        Condition.TARGETS_RESOLVED, TRUE, reasons.PODS_FOUND, "there are pods of each role"
    )


def profiled(
    observed: Observed,
    run: Run | None,
    sets: Sets,
    runs: Runs | None = None,
    verdict: Verdict | None = None,
) -> Finding:
    """Tell whether there is a usable Pareto set of the current inputs, or one that serves while they are measured.

    Args:
        observed: What is.
        run: The run of the current inputs; None where the policy is not accepted.
        sets: The Pareto sets that matter.
        runs: The runs that drift has started.
        verdict: What is to be done about drift.
    """
    condition = Condition.PROFILED
    if run is None:
        return finding(
            condition,
            UNKNOWN,
            reasons.NOT_ACCEPTED,
            "no run is planned until the condition Accepted is True",
        )
    if sets.current and not sets.current.problem:
        text = f"ConfigMap {run.pareto} holds {sets.current.profiles} profiles"
        text += _drift(run, verdict)
        return finding(condition, TRUE, reasons.PROFILED, text)
    kept = f"; the set {sets.in_force.meta.name} keeps serving" if sets.in_force else ""
    job = next((j for j in observed.jobs if j.meta.name == run.job), None)
    failure = _failure(observed, run, sets, job)
    if failure:
        reason, text = failure
        return finding(condition, FALSE, reason, text + kept)
    status = TRUE if sets.in_force else FALSE
    if run.policy.profiling.suspend:
        text = "spec.profiling.suspend is true; set it to false to measure" + kept
        return finding(condition, status, reasons.SUSPENDED, text)
    stuck = _stuck(observed, run)
    if stuck:
        reason, text = stuck
        return finding(condition, FALSE, reason, text + kept)
    text = f"Job {run.job} measures; status.profiling shows how far it is"
    if runs and runs.inputs_digest == run.digest:
        text += f"; transfers were not what was profiled: {runs.message}"
    text += kept
    reason = reasons.REPROFILING if sets.in_force else reasons.PROFILING
    return finding(condition, status, reason, text)


def _drift(run: Run, verdict: Verdict | None) -> str:
    """Return what is done about drift; nothing that changes by itself."""
    if verdict is None or not verdict.message:
        return ""
    if verdict.due:
        due = verdict.due.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"; transfers drifted from them, and are profiled again not before {due}"
    if not run.policy.profiling.on_drift.reprofile:
        return "; transfers drifted from them, and spec.profiling.onDrift.reprofile is false"
    return ""


def _failure(
    observed: Observed, run: Run, sets: Sets, job: JobFacts | None
) -> tuple[Reason, str] | None:
    """Return why the run will give no result unless somebody does something."""
    again = f"delete Job {run.job} to measure again"
    if sets.current:
        text = f"ConfigMap {run.pareto} {sets.current.problem}; delete it and {again}"
        return reasons.RESULT_INVALID, text
    if job and job.failed:
        return _job_failure(observed, run, job)
    if job and job.complete:
        text = f"Job {run.job} ended well but ConfigMap {run.pareto} is not there; {again}"
        return reasons.RESULT_INVALID, text
    taken = taken_names(observed, run)
    if taken:
        text = f"{', '.join(taken)} exists and does not belong to this policy; delete it"
        return reasons.NAME_TAKEN, text
    if observed.refused:
        return reasons.WRITE_REFUSED, f"the API server refused {observed.refused}"
    return None


def taken_names(observed: Observed, run: Run) -> list[str]:
    """Return the children of the run whose names objects of others have."""
    wanted = {"Job": run.job, "ConfigMap": run.configmap}
    facts = [
        *(("Job", j.meta) for j in observed.jobs),
        *(("ConfigMap", r.meta) for r in observed.runs),
    ]
    return [
        f"{kind} {meta.name}"
        for kind, meta in facts
        if meta.name == wanted[kind] and meta.owner_uid != run.uid
    ]


def _job_failure(observed: Observed, run: Run, job: JobFacts) -> tuple[Reason, str]:
    said = _last_words(observed, run, job)
    again = f"then delete Job {run.job} to try again"
    code = exit_code(job, observed.job_pods)
    known = {
        ExitCode.BAD_INPUT: (reasons.BAD_INPUT, "the profiler refused its input"),
        ExitCode.INFEASIBLE: (reasons.INFEASIBLE, "no profile meets the quality budget"),
        ExitCode.UNSUPPORTED: (reasons.UNSUPPORTED, "the model is not supported"),
    }
    if code in known:
        reason, text = known[ExitCode(code)]
        return reason, f"{text}: {said}; change the policy, or correct the cause, {again}"
    if job.failure[0] == "DeadlineExceeded":
        return reasons.DEADLINE_EXCEEDED, (
            f"the run took more than {job.deadline_s} s; raise "
            "spec.profiling.budget.activeDeadlineSeconds and it goes on where it ended"
        )
    if any(p.out_of_memory for p in observed.job_pods if p.job == job.meta.name):
        return reasons.OUT_OF_MEMORY, (
            "the Job's container used more memory than it may; raise "
            "spec.profiling.job.resources.limits.memory and it goes on where it ended"
        )
    return reasons.JOB_FAILED, f"{said}; see the logs of Job {run.job}, {again}"


def _last_words(observed: Observed, run: Run, job: JobFacts) -> str:
    pods = [p for p in observed.job_pods if p.job == job.meta.name and p.ended_with and not p.helps]
    if pods:
        # the last line of a traceback says what it is about
        latest = max(pods, key=lambda pod: (pod.meta.created, pod.meta.name))
        return latest.ended_with.splitlines()[-1]
    facts = next((r for r in observed.runs if r.meta.name == run.configmap), None)
    if facts and facts.progress and facts.progress.message:
        return facts.progress.message
    return ": ".join(part for part in job.failure if part) or "the Job failed"


def _stuck(observed: Observed, run: Run) -> tuple[Reason, str] | None:
    """Return why the Job's pod does not run, if it should."""
    for pod in observed.job_pods:
        # a run goes on without those that help
        if pod.job != run.job or not pod.live or pod.helps:
            continue
        if pod.image_problem:
            text = f"image {run.config.image}: {pod.image_problem}; correct profiler.image in the chart's values"
            return reasons.IMAGE_UNAVAILABLE, text
        if pod.config_problem:
            return reasons.CONTAINER_NOT_CREATED, f"pod {pod.meta.name}: {pod.config_problem}"
        if pod.unschedulable:
            text = (
                f"no node takes pod {pod.meta.name}: {pod.unschedulable}; "
                "lower spec.profiling.job.resources or make room"
            )
            return reasons.UNSCHEDULABLE, text
    return None


def programmed(observed: Observed) -> Finding:
    """Return the controller's own answer, or that there is none."""
    for condition in observed.policy.status.get("conditions") or []:
        if condition.get("type") == Condition.PROGRAMMED:
            return Finding(
                condition=Condition.PROGRAMMED.value,
                status=condition.get("status", UNKNOWN),
                reason=condition.get("reason", reasons.NOT_PROGRAMMED.name),
                message=condition.get("message", ""),
            )
    text = "the controller has not reported on the policy; check that it runs and can reach the API server"
    return finding(Condition.PROGRAMMED, UNKNOWN, reasons.NOT_PROGRAMMED, text)


def ready(findings: list[Finding]) -> Finding:
    """Sum up: the first finding that is not True says what is missing."""
    for one in findings:
        if not one.true:
            return Finding(
                condition=Condition.READY.value,
                status=FALSE,
                reason=one.reason,
                message=f"{one.condition}: {one.message}"[:MAX_MESSAGE],
            )
    return finding(
        Condition.READY, TRUE, reasons.SERVING, "all pods serve profiles within the quality budget"
    )
