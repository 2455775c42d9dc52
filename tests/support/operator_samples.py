"""Facts about a policy and its children, as the operator observes them; every argument changes one thing."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

import samples
from kvserve_api.canonical import digest
from kvserve_api.names import child_name
from kvserve_api.policy import Policy
from kvserve_api.run import RunInputs
from kvserve_operator.config import DEFAULT_RESOURCES, ProfilerConfig
from kvserve_operator.jobs import JobFacts
from kvserve_operator.meta import Meta
from kvserve_operator.observed import Observed, PolicyFacts
from kvserve_operator.plan import Action, Apply, ApplyStatus, Delete, Record, Tune
from kvserve_operator.sets import ProfileFacts, SetFacts

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
CONFIG = ProfilerConfig(image="profiler:1")
DESIRED = {"Prefill": 1, "Decode": 2}


def policy(**spec: Any) -> PolicyFacts:
    """Return a policy of samples."""
    value = samples.policy_object(**spec)
    value["metadata"] |= {"uid": "u1", "generation": 3, "resourceVersion": "7"}
    return PolicyFacts.read(value)


def inputs_digest(facts: PolicyFacts) -> str:
    """Return the digest of the inputs of the policy's run."""
    assert isinstance(facts.policy, Policy)
    return RunInputs.of_policy(facts.policy, text_digests={}, image=CONFIG.image).digest


CURRENT = inputs_digest(policy())
JOB = child_name("chat", "job", CURRENT)
OLD = "sha256:" + "0" * 64
SUSPENDED = policy(profiling={"suspend": True})
LONGER = policy(profiling={"budget": {"activeDeadlineSeconds": 9000}})


def meta(kind: str, inputs: str = CURRENT, **changes: Any) -> Meta:
    """Return the metadata of a child."""
    name = child_name("chat", kind, inputs)
    values: dict[str, Any] = {
        "namespace": "default",
        "name": name,
        "uid": f"uid-{name}",
        "version": 5,
        "created": "2026-01-01T00:00:00Z",
        "policy": "chat",
        "owner_uid": "u1",
        "inputs_digest": inputs,
    }
    return Meta(**values | changes)


def job(inputs: str = CURRENT, **changes: Any) -> JobFacts:
    """Return a running Job."""
    values: dict[str, Any] = {
        "meta": meta("job", inputs),
        "deadline_s": 7200,
        "resources_digest": digest(dict(DEFAULT_RESOURCES)),
        "started": "2026-01-02T00:00:00Z",
    }
    return JobFacts(**values | changes)


def pareto(inputs: str = CURRENT, **changes: Any) -> SetFacts:
    """Return a usable set."""
    values: dict[str, Any] = {
        "meta": meta("pareto", inputs),
        "digest": "sha256:" + "ab" * 32,
        "model": samples.MODEL,
        "losses": {
            "default": (
                ProfileFacts(name="int8", loss_upper_bp=4.2),
                ProfileFacts(name="int4", loss_upper_bp=60.0),
            )
        },
        "profiles": 3,
    }
    return SetFacts(**values | changes)


def observed(facts: PolicyFacts | None = None, **parts: Any) -> Observed:
    """Return what is observed of a policy with pods."""
    return Observed(policy=facts or policy(), now=NOW, **({"desired": DESIRED} | parts))


def brief(actions: list[Action]) -> list[str]:
    """Return the actions without status and events, as words."""
    words = []
    for action in actions:
        match action:
            case Apply():
                metadata = action.manifest["metadata"]
                words.append(f"apply {action.manifest['kind']} {metadata['name']}")
            case Tune():
                words.append(f"tune {action.job.name} {action.suspend} {action.deadline_s}")
            case Delete():
                words.append(f"delete {action.kind} {action.name}")
            case ApplyStatus() | Record():
                pass
    return words


def conditions(actions: list[Action]) -> dict[str, tuple[str, str]]:
    """Return status and reason of each condition that the plan writes."""
    status = next(action.status for action in actions if isinstance(action, ApplyStatus))
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def with_status(state: Observed, status: Mapping[str, Any]) -> Observed:
    """Return the state after the status was written."""
    return dataclasses.replace(state, policy=dataclasses.replace(state.policy, status=status))


def status_of(actions: list[Action]) -> ApplyStatus:
    """Return the plan's status write."""
    return next(action for action in actions if isinstance(action, ApplyStatus))
