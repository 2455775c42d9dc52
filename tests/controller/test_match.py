"""Which policy a pod belongs to."""

from typing import Any

import pytest

from kvserve_api.errors import PolicyError, SpecError
from kvserve_api.policy import Policy
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.table import Role, Version
from kvserve_controller.match import Pod, match, selecting
from kvserve_controller.versions import MAX_EPOCH, VersionClock
from samples import policy_object

POLICIES = {
    policy.key: policy
    for policy in (
        Policy.from_object(policy_object("chat")),
        Policy.from_object(policy_object("other", namespace="prod")),
    )
}


def pod(role: Role = Role.DECODE, **fields: Any) -> Pod:
    """Return a pod."""
    return Pod(**({"namespace": "default", "name": "p", "role": role} | fields))


@pytest.mark.parametrize(
    ("subject", "policy"),
    [
        pytest.param(pod(labels={"app": "chat-decode", "x": "y"}), "default/chat", id="labels"),
        pytest.param(pod(), None, id="no-labels"),
        pytest.param(pod(labels={"app": "other-decode"}), None, id="other-namespace"),
        pytest.param(
            pod(labels={"app": "other-decode"}, namespace="prod"), "prod/other", id="namespace"
        ),
        pytest.param(pod(policy="default/chat"), "default/chat", id="by-name"),
        pytest.param(pod(policy="default/gone", labels={"app": "chat-decode"}), None, id="gone"),
    ],
)
def test_match(subject: Pod, policy: str | None) -> None:
    """A named policy counts if there is one; else the labels do, within the pod's namespace."""
    assert match(subject, POLICIES) == policy


@pytest.mark.parametrize("policy", ["", "default/chat"])
def test_wrong_role_is_told(policy: str) -> None:
    """A pod that its policy selects in the other role is refused with what to correct."""
    with pytest.raises(
        PolicyError, match=r"selects pod default/p as Prefill, but .* runs as Decode"
    ):
        match(pod(policy=policy, labels={"app": "chat-prefill"}), POLICIES)


def test_first_policy_wins() -> None:
    """Where two policies select a pod, the one given first wins."""
    twin = Policy.from_object(
        policy_object("twin", targets=policy_object("chat")["spec"]["targets"])
    )
    subject = pod(labels={"app": "chat-decode"})
    assert match(subject, {"default/twin": twin, **POLICIES}) == "default/twin"
    assert match(subject, {**POLICIES, "default/twin": twin}) == "default/chat"


def test_what_selects_pods() -> None:
    """Policies select the same pods while targets, namespaces and order are the same, whatever else they ask for."""
    chat, other = POLICIES.values()
    looser = Policy.from_object(policy_object("chat", quality={"maxLossBasisPoints": 7}))
    elsewhere = Policy.from_object(
        policy_object("chat", targets=policy_object("new")["spec"]["targets"])
    )
    before = selecting(POLICIES)
    assert selecting({chat.key: looser, other.key: other}) == before
    assert selecting({chat.key: elsewhere, other.key: other}) != before
    assert selecting({other.key: other, chat.key: chat}) != before
    assert selecting({chat.key: chat}) != before


def test_read_hello() -> None:
    """A Hello is read in full; a bare policy name is in the pod's own namespace."""
    hello = pb.Hello(
        pod="p",
        role="Prefill",
        policy="chat",
        version=pb.Version(epoch=1, counter=2),
        stages=["a", "b"],
    )
    read = Pod.read(hello)
    assert (read.key, read.policy, read.role) == ("default/p", "default/chat", Role.PREFILL)
    assert (read.version, read.stages) == (Version(epoch=1, counter=2), frozenset({"a", "b"}))


@pytest.mark.parametrize(
    ("hello", "field"),
    [
        pytest.param(pb.Hello(role="Decode"), "hello.pod", id="nameless"),
        pytest.param(pb.Hello(pod="p", role="kv_both"), "hello.role", id="role"),
        pytest.param(pb.Hello(pod="p" * 300, role="Decode"), "hello.pod", id="long"),
        pytest.param(
            pb.Hello(pod="p", role="Decode", labels={str(n): "" for n in range(200)}),
            "hello",
            id="labels",
        ),
    ],
)
def test_bad_hello(hello: pb.Hello, field: str) -> None:
    """A Hello that nobody can place is refused with the field."""
    with pytest.raises(SpecError) as caught:
        Pod.read(hello)
    assert caught.value.field == field


def test_versions_never_go_back() -> None:
    """Each version is above all before it and all that pods announced, also from a later epoch."""
    clock = VersionClock(100.7)
    first = clock.next()
    assert (first, clock.next()) == (
        Version(epoch=100_700, counter=1),
        Version(epoch=100_700, counter=2),
    )
    clock.raise_above(Version(epoch=90_000, counter=10**6))
    assert clock.next() == Version(epoch=100_700, counter=3)
    for announced in (Version(epoch=100_700, counter=50), Version(epoch=200_000, counter=1)):
        clock.raise_above(announced)
        assert clock.next() > announced
    assert VersionClock(100.701).next() > first


def test_absurd_version_is_refused() -> None:
    """A pod can't push the epoch to where no later one fits."""
    with pytest.raises(SpecError, match=r"version\.epoch"):
        VersionClock(1.0).raise_above(Version(epoch=MAX_EPOCH, counter=0))
