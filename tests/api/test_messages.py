"""Tables as protobuf messages."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.errors import SpecError
from kvserve_api.policy import Policy
from kvserve_api.profile_set import Profile
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import (
    push_from_table,
    table_from_push,
    version_from_message,
    version_to_message,
)
from kvserve_api.table import (
    Candidate,
    ClassRule,
    DecisionTable,
    Doubt,
    OnControllerLoss,
    Version,
)
from samples import INT4, RAW, policy_object


def candidate(p: Profile, bundle: str | None = None) -> Candidate:
    """Return a profile as a candidate."""
    return Candidate(
        name=p.name,
        strategy=p.strategy,
        ratio=p.ratio,
        loss_upper_bp=p.loss_upper_bp,
        encode=p.encode,
        decode=p.decode,
        bundle=bundle,
        doubt=Doubt(encode=0.25, decode=0.5, wire=0.125),
    )


def table(deadline_s: float = math.inf) -> DecisionTable:
    """Return a table that uses every field."""
    policy = Policy.from_object(policy_object(control={"mode": "Pinned", "pinnedProfile": "int4"}))
    return DecisionTable(
        version=Version(epoch=1 << 40, counter=7),
        policy=policy.key,
        mode=policy.control.mode,
        candidates={"none": candidate(RAW), "int4": candidate(INT4, "sha256:00")},
        rules={
            name: ClassRule(
                goal=policy.classes["default"].slo.goal,
                candidates=("int4", "none"),
                deadline_s=deadline_s,
                margins={"int4": 1.5},
                explore_share=0.02,
            )
            for name in ("default", "code")
        },
        pinned="int4",
        fallback="none",
        ttl_s=60.0,
        on_controller_loss=OnControllerLoss.REVERT,
        prior_bytes_per_s=1e6,
        hysteresis=0.03,
    )


@given(st.floats(1e-6, 1e6) | st.just(math.inf))
def test_table_round_trip(deadline_s: float) -> None:
    """A table survives the wire, infinities included."""
    push = push_from_table(table(deadline_s), "n1")
    again = pb.Push.FromString(push.SerializeToString())
    assert again.nonce == "n1"
    assert table_from_push(again) == table(deadline_s)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_version_round_trip(epoch: int, counter: int) -> None:
    """A version survives the wire."""
    version = Version(epoch=epoch, counter=counter)
    assert version_from_message(version_to_message(version)) == version


def broken(**fields: Any) -> pb.Push:
    """Return a push with fields of its table, or of its first candidate, replaced."""
    push = push_from_table(table(), "n")
    for name, value in fields.items():
        setattr(
            push.table.candidates[0] if hasattr(pb.Candidate(), name) else push.table, name, value
        )
    return push


def broken_rule(margins: dict[str, float] | None = None, explore_share: float = 0.0) -> pb.Push:
    """Return a push with another margin or share in its default rule."""
    push = push_from_table(table(), "n")
    rule = push.table.rules["default"]
    rule.explore_share = explore_share
    for name, margin in (margins or {}).items():
        rule.margins[name] = margin
    return push


def test_table_of_an_earlier_controller() -> None:
    """What an earlier controller does not say means: certain, no margin, no exploring, no hysteresis."""
    push = push_from_table(table(), "n")
    push.table.ClearField("hysteresis")
    for candidate_message in push.table.candidates:
        for name in ("encode_doubt", "decode_doubt", "wire_doubt"):
            candidate_message.ClearField(name)
    for rule in push.table.rules.values():
        rule.ClearField("margins")
        rule.ClearField("explore_share")
    read = table_from_push(push)
    assert read.hysteresis == 0
    assert read.candidates["int4"].doubt == Doubt()
    assert read.rules["default"].margins == {}
    assert read.rules["default"].explore_share == 0


@pytest.mark.parametrize(
    "push",
    [
        pytest.param(pb.Push(), id="empty"),
        pytest.param(broken(mode="Turbo"), id="mode"),
        pytest.param(broken(on_controller_loss=""), id="loss"),
        pytest.param(broken(ttl_s=math.nan), id="ttl"),
        pytest.param(broken(prior_bytes_per_s=-1.0), id="prior"),
        pytest.param(broken(fallback="gone"), id="fallback"),
        pytest.param(broken(pinned=""), id="pinned"),
        pytest.param(broken(ratio=math.nan), id="ratio"),
        pytest.param(broken(loss_upper_bp=-1.0), id="loss-bp"),
        pytest.param(broken(strategy=b"["), id="strategy-not-json"),
        pytest.param(broken(strategy=b"[" * 10_000), id="strategy-deep"),
        pytest.param(broken(strategy=b" " * 20_000), id="strategy-long"),
        pytest.param(broken(strategy=b'{"schema":"x"}'), id="strategy-schema"),
        pytest.param(broken(name="other"), id="renamed"),
        pytest.param(broken(encode_doubt=math.nan), id="doubt"),
        pytest.param(broken(hysteresis=-1.0), id="hysteresis"),
        pytest.param(broken_rule(explore_share=math.nan), id="share"),
        pytest.param(broken_rule(margins={"int4": 0.5}), id="margin"),
        pytest.param(broken_rule(margins={"gone": 2.0}), id="margin-of-nobody"),
    ],
)
def test_bad_push_is_a_typed_error(push: pb.Push) -> None:
    """A table that can't be trusted is a SpecError, which a pod answers with a Nack."""
    with pytest.raises(SpecError):
        table_from_push(push)


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_bad_cost_is_a_typed_error(value: float) -> None:
    """A cost that is no time is refused."""
    push = push_from_table(table(), "n")
    push.table.candidates[0].encode.floor_s = value
    with pytest.raises(SpecError, match="floor_s"):
        table_from_push(push)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_a_typed_error(data: bytes) -> None:
    """No bytes in place of a strategy lead to an error of another kind."""
    push = push_from_table(table(), "n")
    push.table.candidates[0].strategy = data
    with pytest.raises(SpecError):
        table_from_push(push)


def test_push_of_a_usual_table_is_small() -> None:
    """A table of a few profiles is far below the limit of a message."""
    assert push_from_table(table(), "n").ByteSize() < 2_000
