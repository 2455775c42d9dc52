"""The cache: the newest facts of each object, found by policy."""

import dataclasses

from kvserve_operator.cache import Cache
from kvserve_operator.jobs import JobFacts, PodFacts
from kvserve_operator.meta import Meta
from kvserve_operator.observed import PolicyFacts

META = Meta(namespace="n", name="j", uid="u", version=5, policy="chat")


def test_older_facts_do_not_win() -> None:
    """A watch that is behind does not undo what the answer of a write told."""
    cache = Cache()
    cache.put(JobFacts(meta=META, failed=True))
    cache.put(JobFacts(meta=dataclasses.replace(META, version=4)))
    assert [j.failed for j in cache.children(JobFacts, "n", "chat")] == [True]


def test_a_deleted_object_stays_deleted() -> None:
    """A late answer about a deleted object does not bring it back."""
    cache = Cache()
    cache.put(JobFacts(meta=META))
    cache.drop("u")
    cache.put(JobFacts(meta=dataclasses.replace(META, version=9)))
    assert cache.children(JobFacts, "n", "chat") == ()
    cache.drop("unknown")


def test_an_object_moves_with_its_label() -> None:
    """An object that is given to another policy is found there only."""
    cache = Cache()
    cache.put(JobFacts(meta=META))
    cache.put(JobFacts(meta=dataclasses.replace(META, version=6, policy="other")))
    assert cache.children(JobFacts, "n", "chat") == ()
    assert len(cache.children(JobFacts, "n", "other")) == 1


def test_pods_of_jobs_are_no_targets() -> None:
    """Pods of profiling Jobs belong to their policy, other pods to the namespace."""
    cache = Cache()
    cache.put(PodFacts(meta=META, job="j"))
    cache.put(PodFacts(meta=dataclasses.replace(META, uid="v", name="p", policy="")))
    assert [p.meta.name for p in cache.children(PodFacts, "n", "chat")] == ["j"]
    assert [p.meta.name for p in cache.pods("n")] == ["p"]


def test_the_younger_of_one_name_is_the_policy() -> None:
    """While a deleted policy is still known, the one made anew is meant by their name."""
    cache = Cache()
    for uid, version in (("new", 9), ("old", 3)):
        meta = Meta(namespace="n", name="chat", uid=uid, version=version)
        cache.put(PolicyFacts(meta=meta, generation=1, policy=None))
    found = cache.policy("n", "chat")
    assert found
    assert found.meta.uid == "new"
    assert cache.policy("n", "none") is None
