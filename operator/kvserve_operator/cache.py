"""What the watches have delivered, as facts, found by the policy or namespace they matter to.

Answers of the operator's own writes are put in too, so that a plan never forgets what was just done because the watch
is a moment behind.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Final, TypeVar

from kvserve_operator.jobs import JobFacts, PodFacts
from kvserve_operator.meta import Meta
from kvserve_operator.observed import PolicyFacts, RunFacts
from kvserve_operator.sets import SetFacts

Facts = PolicyFacts | JobFacts | PodFacts | RunFacts | SetFacts
F = TypeVar("F", PolicyFacts, JobFacts, PodFacts, RunFacts, SetFacts)
_REMEMBERED_DELETIONS: Final = 10_000


class Cache:
    """Facts by kind and group: children by (namespace, policy), policies and other pods by namespace."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[str, Any]] = {}
        self._group_of: dict[str, Hashable] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()

    def put(self, facts: Facts) -> None:
        """Keep the facts, unless newer ones of the object are known or it was deleted."""
        meta = facts.meta
        if meta.uid in self._deleted:
            return
        group = _group(facts)
        before = self._group_of.get(meta.uid)
        if before is not None:
            if self._groups[before][meta.uid].meta.version > meta.version:
                return
            if before != group:
                self._remove(meta.uid)
        self._group_of[meta.uid] = group
        self._groups.setdefault(group, {})[meta.uid] = facts

    def drop(self, uid: str) -> None:
        """Forget a deleted object for good."""
        self._remove(uid)
        self._deleted[uid] = None
        while len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    def policies(self, namespace: str) -> list[PolicyFacts]:
        """Return the policies of a namespace."""
        return self._facts(PolicyFacts, namespace)

    def policy(self, namespace: str, name: str) -> PolicyFacts | None:
        """Return a policy, the younger if one of the same name is on its way out."""
        named = [p for p in self.policies(namespace) if p.meta.name == name]
        return max(named, key=lambda p: p.meta.version, default=None)

    def policy_keys(self) -> list[tuple[str, str]]:
        """Return namespace and name of every policy."""
        return [
            (facts.meta.namespace, facts.meta.name)
            for group, members in self._groups.items()
            for facts in members.values()
            if isinstance(facts, PolicyFacts)
        ]

    def children(self, kind: type[F], namespace: str, policy: str) -> tuple[F, ...]:
        """Return a policy's children of a kind."""
        found = self._facts(kind, (namespace, policy))
        return tuple(sorted(found, key=lambda facts: facts.meta.name))

    def pods(self, namespace: str) -> list[PodFacts]:
        """Return the pods of a namespace that are not pods of profiling Jobs."""
        return self._facts(PodFacts, namespace)

    def _facts(self, kind: type[F], key: Hashable) -> list[F]:
        return list(self._groups.get((kind, key), {}).values())

    def _remove(self, uid: str) -> None:
        group = self._group_of.pop(uid, None)
        if group is None:
            return
        members = self._groups[group]
        del members[uid]
        if not members:
            del self._groups[group]


def _group(facts: Facts) -> Hashable:
    meta: Meta = facts.meta
    if isinstance(facts, PolicyFacts) or (isinstance(facts, PodFacts) and not facts.job):
        return type(facts), meta.namespace
    return type(facts), (meta.namespace, meta.policy)
