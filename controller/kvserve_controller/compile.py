"""From a policy and a Pareto set to a decision table: a pure function of values."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from kvserve_api.errors import ArtifactError, PolicyError
from kvserve_api.latency import Link
from kvserve_api.policy import Metric, Mode, Objective, Policy
from kvserve_api.profile_set import NONE, ParetoSet, Profile
from kvserve_api.quality import QualityBudget
from kvserve_api.table import (
    MAX_CANDIDATES,
    Candidate,
    ClassRule,
    DecisionTable,
    OnControllerLoss,
    Version,
)
from kvserve_controller.forecast import PRIOR_SPREAD, Spread, margin
from kvserve_controller.learn import UNCORRECTED, Correction

UNKNOWN_MODEL_SHARE: Final = 0.5
"""Share of a time-to-first-token threshold kept for the model until its time was observed."""
LEAST_TRANSFER_SHARE: Final = 0.05
"""Share of such a threshold that is left to the transfer even if the model alone uses it up."""
REFERENCE_BYTES: Final = 64 << 20
"""Native bytes at which codec times are compared when candidates are spread, and of a transfer before any was seen."""
HYSTERESIS: Final = 0.03
"""By what share another profile must be better than the one in use: less is noise, more would cost what it saves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What the traffic taught.

    Attributes:
        corrections: Multiplicative corrections by profile name.
        model_s: Observed percentiles of the model's own time before a transfer, in seconds, by workload class and
            percentile; what is missing was not observed.
        spread: Of transfer times about what pods predict of them.
        leeways: By workload class and objective, by how much the percentile may be lower that margins are made for.
        at_risk: The workload classes whose objectives are not kept comfortably: they don't explore.
        native_bytes: Of a usual transfer.
        bytes_per_s: Goodput of a usual link; 0 if none was seen.
    """

    corrections: Mapping[str, Correction]
    model_s: Mapping[tuple[str, int], float]
    spread: Spread = PRIOR_SPREAD
    leeways: Mapping[tuple[str, Objective], float] = field(default_factory=dict)
    at_risk: frozenset[str] = frozenset()
    native_bytes: int = REFERENCE_BYTES
    bytes_per_s: float = 0.0


NOTHING_LEARNED: Final = Learned(corrections={}, model_s={})


def compile_table(
    policy: Policy,
    pareto: ParetoSet,
    *,
    version: Version,
    prior_bytes_per_s: float,
    learned: Learned = NOTHING_LEARNED,
) -> DecisionTable:
    """Compile the table of a policy.

    Each workload class may use at most ``MAX_CANDIDATES`` profiles whose upper limits of quality loss are within its
    budgets, always with ``none``; one that was not measured on a task of the class is not. A pinned profile is meant
    and may exceed the budget; a fallback may not, because it applies without anybody asking for it.

    Raises:
        PolicyError: The pinned or fallback profile doesn't exist, or the fallback exceeds a budget.
        ArtifactError: The set is for another model, or its classes contradict each other.
    """
    _check_model(policy, pareto)
    profiles = merge_classes(policy, pareto)
    control = policy.control
    if control.pinned is not None:
        _check_known("spec.control.pinnedProfile", control.pinned, profiles)
    _check_known("spec.control.failsafe.fallbackProfile", control.fallback, profiles)
    _check_fallback(policy, pareto)
    names = {
        name: shortlist(feasible(pareto.profiles(name), workload.budget))
        for name, workload in sorted(policy.classes.items())
    }
    used = {NONE, control.fallback} | {each for chosen in names.values() for each in chosen}
    used |= {control.pinned} if control.pinned is not None else set()
    candidates = {
        name: correct(profiles[name], learned.corrections.get(name, UNCORRECTED))
        for name in sorted(used)
    }
    link = Link(bytes_per_s=learned.bytes_per_s or prior_bytes_per_s)
    rules = {
        name: _rule(policy, name, [candidates[each] for each in chosen], learned, link)
        for name, chosen in names.items()
    }
    return DecisionTable(
        version=version,
        policy=policy.key,
        mode=control.mode,
        candidates=candidates,
        rules=rules,
        pinned=control.pinned,
        fallback=control.fallback,
        ttl_s=float(control.lease_s),
        on_controller_loss=OnControllerLoss(control.on_controller_loss),
        prior_bytes_per_s=prior_bytes_per_s,
        hysteresis=HYSTERESIS,
    )


def _rule(
    policy: Policy, name: str, candidates: list[Candidate], learned: Learned, link: Link
) -> ClassRule:
    """Return how a workload class chooses among its candidates."""
    slo = policy.classes[name].slo
    thresholds_s = [allowed_s(name, objective, learned.model_s) for objective in slo.objectives]
    margins = {
        candidate.name: margin(
            candidate,
            slo.objectives,
            thresholds_s,
            leeways=[learned.leeways.get((name, objective), 0.0) for objective in slo.objectives],
            spread=learned.spread,
            native_bytes=learned.native_bytes,
            link=link,
        )
        for candidate in candidates
    }
    explores = policy.control.mode is Mode.ACTIVE and name not in learned.at_risk
    return ClassRule(
        goal=slo.goal,
        candidates=tuple(candidate.name for candidate in candidates),
        deadline_s=min(thresholds_s, default=math.inf),
        margins=margins if thresholds_s else {},
        explore_share=policy.control.exploration_bp / 10_000 if explores else 0.0,
    )


def merge_classes(policy: Policy, pareto: ParetoSet) -> dict[str, Profile]:
    """Return the profiles of all the policy's classes by name.

    A profile measured in several classes keeps what was measured in the first of them (``default`` before the others)
    and the largest of its losses.

    Raises:
        ArtifactError: Two classes give one name to two strategies.
    """
    merged: dict[str, Profile] = {}
    for workload_class in policy.classes:
        for profile in pareto.profiles(workload_class):
            known = merged.setdefault(profile.name, profile)
            if known.strategy.digest != profile.strategy.digest:
                raise ArtifactError(
                    f"classes.{workload_class}",
                    f"names another strategy {profile.name!r} than an earlier class: profile again",
                )
            if profile.loss_upper_bp > known.loss_upper_bp:
                merged[profile.name] = replace(
                    known, loss_bp=profile.loss_bp, loss_upper_bp=profile.loss_upper_bp
                )
    return merged


def feasible(profiles: Iterable[Profile], budget: QualityBudget) -> list[Profile]:
    """Return the profiles whose upper limits of loss are within the budget, and ``none``."""
    return [p for p in profiles if budget.admits(p) or p.name == NONE]


def shortlist(profiles: Iterable[Profile], limit: int = MAX_CANDIDATES) -> tuple[str, ...]:
    """Return the names of at most ``limit`` profiles that differ most, by falling ratio.

    Starts with ``none`` and the largest ratio and adds the profile farthest from those chosen, in ratio, loss and
    codec time on logarithmic scales (farthest-point traversal, Gonzalez 1985). The order of the input doesn't matter.

    Args:
        profiles: With ``none``.
        limit: At least 2.
    """
    pool = sorted(profiles, key=lambda profile: (-profile.ratio, profile.name))
    if len(pool) > limit:
        places = _places(pool)
        chosen = {NONE, next(profile.name for profile in pool if profile.name != NONE)}
        while len(chosen) < limit:
            rest = [profile.name for profile in pool if profile.name not in chosen]
            chosen.add(
                max(rest, key=lambda name: min(math.dist(places[name], places[c]) for c in chosen))
            )
        pool = [profile for profile in pool if profile.name in chosen]
    return tuple(profile.name for profile in pool)


def allowed_s(
    workload_class: str, objective: Objective, model_s: Mapping[tuple[str, int], float]
) -> float:
    """Return the most seconds a transfer may take to keep an objective.

    A time-to-first-token objective leaves a transfer what the model doesn't use: the threshold less the same
    percentile of the model's observed time, or a conservative share of the threshold before any was observed.
    """
    threshold_s = objective.threshold_ms / 1000
    if objective.metric is not Metric.TIME_TO_FIRST_TOKEN:
        return threshold_s
    used_s = model_s.get((workload_class, objective.percentile), UNKNOWN_MODEL_SHARE * threshold_s)
    return max(threshold_s - used_s, LEAST_TRANSFER_SHARE * threshold_s)


def correct(profile: Profile, correction: Correction) -> Candidate:
    """Return the profile as pods get it, its costs and ratio corrected by what was learned."""
    return Candidate(
        name=profile.name,
        strategy=profile.strategy,
        ratio=profile.ratio / correction.wire,
        loss_upper_bp=profile.loss_upper_bp,
        encode=correction.scale(profile.encode, correction.encode),
        decode=correction.scale(profile.decode, correction.decode),
        bundle=profile.bundle,
        doubt=correction.doubt,
    )


def _places(profiles: list[Profile]) -> dict[str, tuple[float, ...]]:
    """Return where each profile stands in the unit cube of log ratio, log loss and log codec time."""
    raw = {
        p.name: (
            math.log(p.ratio),
            math.log1p(p.loss_upper_bp),
            math.log(1e-6 + p.encode.seconds(REFERENCE_BYTES) + p.decode.seconds(REFERENCE_BYTES)),
        )
        for p in profiles
    }
    axes = list(zip(*raw.values(), strict=True))
    spans = [(min(axis), max(axis) - min(axis) or 1.0) for axis in axes]
    return {
        name: tuple((x - low) / span for x, (low, span) in zip(place, spans, strict=True))
        for name, place in raw.items()
    }


def _check_model(policy: Policy, pareto: ParetoSet) -> None:
    wanted = (policy.model.name, policy.model.revision)
    measured = (pareto.model.name, pareto.model.revision)
    if wanted != measured:
        raise ArtifactError(
            "model",
            f"is {'@'.join(measured)} but the policy is for {'@'.join(wanted)}: profile that one",
        )


def _check_known(field: str, name: str, profiles: Mapping[str, Profile]) -> None:
    if name not in profiles:
        known = ", ".join(sorted(profiles))
        raise PolicyError(field, f"names no measured profile: {name!r}; known: {known}")


def _check_fallback(policy: Policy, pareto: ParetoSet) -> None:
    for name, workload in policy.classes.items():
        allowed = [p.name for p in feasible(pareto.profiles(name), workload.budget)]
        if policy.control.fallback not in allowed:
            asked = "".join(
                f", {bp} of task {task}" for task, bp in sorted(workload.budget.tasks.items())
            )
            raise PolicyError(
                "spec.control.failsafe.fallbackProfile",
                f"{policy.control.fallback!r} exceeds the quality budget of workload class {name!r}"
                f" ({workload.max_loss_bp} basis points{asked}); within it: {', '.join(sorted(allowed))}",
            )
