"""What to do about a policy: a pure function from what is observed to actions.

The actions may be carried out any number of times and may end after any of them: the next plan goes on from what is
there. There is nothing to undo and nothing to remember.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvserve_api.canonical import digest
from kvserve_api.errors import SpecError
from kvserve_api.names import ExitCode, child_name
from kvserve_api.run import RunInputs
from kvserve_operator import conditions, reasons
from kvserve_operator.config import ProfilerConfig
from kvserve_operator.drift import Runs, Verdict, judge
from kvserve_operator.feasibility import quality_feasible
from kvserve_operator.findings import Finding, Sets
from kvserve_operator.jobs import JobFacts, exit_code
from kvserve_operator.meta import Meta
from kvserve_operator.observed import Observed
from kvserve_operator.reasons import Condition
from kvserve_operator.render import Manifest, Run
from kvserve_operator.status import Status, desired_status, only_progress, owned_status

KEPT_SETS: Final = 2
"""Pareto sets of a policy that are kept, the one in force included."""
_TOLD_WHEN_TRUE: Final = (Condition.PROFILED, Condition.READY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """Make an object as the manifest says, by a server-side apply."""

    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """Change what may change of a running Job.

    Attributes:
        job: The Job as it was seen; it must not have changed since.
        suspend: Whether it pauses.
        deadline_s: Most seconds it may take.
    """

    job: Meta
    suspend: bool
    deadline_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Delete:
    """Delete an object, if it exists.

    Attributes:
        kind: Its kind.
        namespace: Its namespace.
        name: Its name.
        uid: It must be this object; empty for any.
    """

    kind: str
    namespace: str
    name: str
    uid: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyStatus:
    """Make the operator's part of the policy's status so.

    Attributes:
        status: The part.
        urgent: It says more than how far the run is.
    """

    status: Status
    urgent: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Tell in an event of the policy what happened."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LookAgain:
    """Plan again, though nothing may have changed but the time.

    Attributes:
        after_s: When, in seconds from now.
    """

    after_s: float


Change = Apply | Tune | Delete | ApplyStatus | Record
Action = Change | LookAgain


def plan(observed: Observed, config: ProfilerConfig) -> list[Action]:
    """Return what to do, in order.

    Args:
        observed: What is.
        config: What profiling Jobs are made of.
    """
    if observed.policy.meta.deleting:
        return []
    acceptance = conditions.accepted(observed)
    runs = Runs.read(observed.policy.status)
    run = _run(observed, config, runs) if acceptance.true else None
    sets = choose_sets(observed, run)
    actions: list[Action] = []
    verdict = Verdict()
    if run and sets.current and sets.current == sets.in_force:
        verdict = judge(observed, sets.current, runs)
        if verdict.in_a_row:
            run, runs = _another(observed, config, runs, verdict)
            sets = choose_sets(observed, run)
            actions.append(_drift_event(run, runs))
        elif verdict.due:
            actions.append(LookAgain(after_s=(verdict.due - observed.now).total_seconds()))
    if run:
        actions += _run_actions(observed, run, sets)
        actions += _superseded(observed, run, sets)
    findings = [
        acceptance,
        conditions.targets_resolved(observed),
        conditions.profiled(observed, run, sets, runs, verdict),
        quality_feasible(observed.policy.policy, sets.in_force),
    ]
    order = [findings[0], findings[2], findings[3], findings[1], conditions.programmed(observed)]
    findings.append(conditions.ready(order))
    desired = desired_status(observed, run, sets, findings, runs)
    return actions + _status_actions(observed, desired, findings)


def _another(
    observed: Observed, config: ProfilerConfig, runs: Runs, verdict: Verdict
) -> tuple[Run, Runs]:
    """Return the run that drift starts, and what is then remembered of such runs."""
    later = Runs(total=runs.total + 1, in_a_row=verdict.in_a_row, message=verdict.message)
    run = _run(observed, config, later)
    return run, dataclasses.replace(later, inputs_digest=run.digest)


def _drift_event(run: Run, runs: Runs) -> Record:
    row = f", for the {runs.in_a_row}th time in a row" if runs.in_a_row > 1 else ""
    text = f"transfers are not what was profiled{row}: {runs.message}; Job {run.job} measures anew"
    return Record(reason=reasons.DRIFT_REPROFILING.name, message=text, warning=True)


def _run(observed: Observed, config: ProfilerConfig, runs: Runs) -> Run:
    policy = observed.policy.policy
    if policy is None:
        raise SpecError("policy", "an accepted policy can be read")
    inputs = RunInputs.of_policy(
        policy,
        text_digests={name: text.digest for name, text in observed.texts.items()},
        task_digests={key: text.digest for key, text in observed.tasks.items()},
        image=config.image,
        artifacts=config.artifacts.url,
        drift_runs=runs.total,
    )
    return Run(policy=policy, uid=observed.policy.meta.uid, inputs=inputs, config=config)


def choose_sets(observed: Observed, run: Run | None) -> Sets:
    """Return the set of the current inputs and the one in force.

    In force is the current one if it is usable, else the one that was in force, else the youngest usable one. None is
    in force for a policy whose pods belong to an older policy.
    """
    uid = observed.policy.meta.uid
    own = [s for s in observed.sets if s.meta.owner_uid == uid and not s.meta.deleting]
    current = None
    if run:
        current = next((s for s in own if s.meta.name == run.pareto), None)
        if current and not current.problem and current.model != run.policy.model.name:
            problem = f"was measured on the model {current.model}"
            current = dataclasses.replace(current, problem=problem)
    if observed.winner:
        return Sets(current=current)
    if current and not current.problem:
        return Sets(current=current, in_force=current)
    usable = [s for s in own if not s.problem and (run is None or s.meta.name != run.pareto)]
    before = ((observed.policy.status.get("pareto") or {}).get("configMapRef") or {}).get("name")
    usable.sort(key=lambda s: (s.meta.name == before, s.meta.created, s.meta.name))
    return Sets(current=current, in_force=usable[-1] if usable else None)


def _run_actions(observed: Observed, run: Run, sets: Sets) -> list[Action]:
    """Start, pause, resume or replace the run's Job."""
    job = next((j for j in observed.jobs if j.meta.name == run.job), None)
    suspend = run.policy.profiling.suspend
    if sets.current or conditions.taken_names(observed, run):
        return []
    if job is None:
        if suspend:
            return []
        started = Record(
            reason=reasons.PROFILING_STARTED.name,
            message=f"Job {run.job} measures at most {run.inputs.max_trials} strategies",
        )
        return [*(Apply(manifest=manifest) for manifest in run.manifests()), started]
    if job.meta.deleting:
        return []
    if job.failed:
        return _retry(observed, run, job)
    deadline_s = run.policy.profiling.active_deadline_s
    if not job.complete and (job.suspended, job.deadline_s) != (suspend, deadline_s):
        return [Tune(job=job.meta, suspend=suspend, deadline_s=deadline_s)]
    return []


def _retry(observed: Observed, run: Run, job: JobFacts) -> list[Action]:
    """Replace a failed Job if the policy gives it more time or other resources now; its trials are kept."""
    changed = (
        job.deadline_s != run.policy.profiling.active_deadline_s
        or job.resources_digest != digest(dict(run.resources))
    )
    final = (ExitCode.BAD_INPUT, ExitCode.INFEASIBLE, ExitCode.UNSUPPORTED)
    if not changed or exit_code(job, observed.job_pods) in final:
        return []
    text = f"Job {run.job} failed and is made anew with the changed deadline or resources"
    return [_delete("Job", job.meta), Record(reason=reasons.RUN_RETRIED.name, message=text)]


def _superseded(observed: Observed, run: Run, sets: Sets) -> list[Action]:
    """Delete what earlier inputs left, but for the youngest Pareto sets."""
    actions: list[Action] = []
    metas = [*(job.meta for job in observed.jobs), *(facts.meta for facts in observed.runs)]
    old = {m.inputs_digest for m in metas if m.owner_uid == run.uid and not m.deleting}
    for inputs_digest in sorted(old - {run.digest, ""}):
        actions += _delete_run(observed, run, inputs_digest)
    own = [s for s in observed.sets if s.meta.owner_uid == run.uid and not s.meta.deleting]
    kept = {s.meta.name for s in (sets.current, sets.in_force) if s}
    rest = [s.meta for s in own if s.meta.name not in kept]
    rest.sort(key=lambda meta: (meta.created, meta.name), reverse=True)
    surplus = rest[max(0, KEPT_SETS - len(kept)) :]
    return actions + [_delete("ConfigMap", meta) for meta in surplus]


def _delete_run(observed: Observed, run: Run, inputs_digest: str) -> list[Action]:
    """Delete an earlier run, its ConfigMap last: while that is there, all of this is planned again."""
    jobs = [j for j in observed.jobs if j.meta.inputs_digest == inputs_digest]
    runs = [r for r in observed.runs if r.meta.inputs_digest == inputs_digest]
    name = child_name(run.policy.name, "job", inputs_digest)
    actions: list[Action] = [
        Delete(kind=kind, namespace=run.policy.namespace, name=name)
        for kind in ("RoleBinding", "Role", "ServiceAccount")
    ]
    metas = [("Job", j.meta) for j in jobs] + [("ConfigMap", r.meta) for r in runs]
    actions += [_delete(kind, meta) for kind, meta in metas if not meta.deleting]
    if any(not (j.complete or j.failed or j.meta.deleting) for j in jobs):
        text = f"the inputs changed: Job {name} is deleted, Job {run.job} measures instead"
        actions.append(Record(reason=reasons.RUN_SUPERSEDED.name, message=text))
    return actions


def _delete(kind: str, meta: Meta) -> Delete:
    return Delete(kind=kind, namespace=meta.namespace, name=meta.name, uid=meta.uid)


def _status_actions(
    observed: Observed, desired: Status, findings: Iterable[Finding]
) -> list[Action]:
    """Return the status if it differs, and an event for each answer that changed."""
    there = owned_status(observed.policy.status)
    if desired == there:
        return []
    actions: list[Action] = [ApplyStatus(status=desired, urgent=not only_progress(desired, there))]
    before = {c["type"]: (c.get("status"), c.get("reason")) for c in there["conditions"]}
    for finding in findings:
        if before.get(finding.condition) == (finding.status, finding.reason):
            continue
        if finding.warning or (finding.true and finding.condition in _TOLD_WHEN_TRUE):
            actions.append(
                Record(reason=finding.reason, message=finding.message, warning=finding.warning)
            )
    return actions
