"""Which of several policies may have a pod: the older one."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from kvserve_api.policy import Policy
from kvserve_operator.observed import PolicyFacts

Labels = Mapping[str, str]


def overlap(one: Policy, other: Policy, pods: Iterable[Labels]) -> bool:
    """Tell whether two policies select the same pods.

    They do if a selector of one implies a selector of the other, whatever pods there are, or if a pod matches both.

    Args:
        one: A policy.
        other: Another one of the same namespace.
        pods: Labels of the namespace's pods.
    """
    pairs = list(product(one.targets, other.targets))
    if any(_nested(a.match_labels, b.match_labels) for a, b in pairs):
        return True
    return any(a.matches(labels) and b.matches(labels) for labels in pods for a, b in pairs)


def winner(policy: PolicyFacts, rivals: Iterable[PolicyFacts], pods: Sequence[Labels]) -> str:
    """Return the name of the older policy that has pods of this one, or an empty string.

    A policy that lost its own pods takes none from others.

    Args:
        policy: The policy in question.
        rivals: All policies of its namespace.
        pods: Labels of the namespace's pods.
    """
    if policy.policy is None:
        return ""
    readable = [rival for rival in rivals if rival.policy is not None and not rival.meta.deleting]
    older = sorted((rival for rival in readable if _age(rival) < _age(policy)), key=_age)
    return _winner(policy.policy, older, pods)


def _winner(policy: Policy, older: Sequence[PolicyFacts], pods: Sequence[Labels]) -> str:
    # few pods of a namespace are a policy's own, and only these can be another's as well
    own = [labels for labels in pods if any(t.matches(labels) for t in policy.targets)]
    for index, rival in enumerate(older):
        if rival.policy is None or not overlap(policy, rival.policy, own):
            continue
        if not _winner(rival.policy, older[:index], pods):
            return rival.meta.name
    return ""


def self_overlap(policy: Policy) -> bool:
    """Tell whether one of the policy's selectors implies the other: such a pod would have two roles."""
    targets = policy.targets
    return any(_nested(a.match_labels, b.match_labels) for a in targets for b in targets if a != b)


def _nested(one: Labels, other: Labels) -> bool:
    return one.items() <= other.items() or other.items() <= one.items()


def _age(facts: PolicyFacts) -> tuple[str, str]:
    return facts.meta.created, facts.meta.name
