"""Decisions and their explanations."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from kvserve_api.decision import Decision, Verdict, decide, explained, weigh
from kvserve_api.errors import SpecError
from kvserve_api.latency import Link, Load
from kvserve_api.policy import Goal, Mode
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import decision_from_message, decision_to_message
from kvserve_api.selection import Bound
from kvserve_api.table import Candidate, ClassRule, DecisionTable, OnControllerLoss, Version
from samples import INT4, INT8, RANS, RAW

SIZE = 50_000_000
LOAD = Load(arrivals_per_s=1.2, native_bytes_per_s=1.2 * SIZE)
LINK = Link(bytes_per_s=25e6, load=LOAD, encoder_load=LOAD)


def table(**changes: Any) -> DecisionTable:
    """Return a table that wants the best quality within 0.9 s."""
    profiles = (RANS, INT4, INT8, RAW)
    values: dict[str, Any] = {
        "version": Version(epoch=1, counter=1),
        "policy": "default/chat",
        "mode": Mode.ACTIVE,
        "candidates": {
            p.name: Candidate(
                name=p.name,
                strategy=p.strategy,
                ratio=p.ratio,
                loss_upper_bp=p.loss_upper_bp,
                encode=p.encode,
                decode=p.decode,
            )
            for p in profiles
        },
        "rules": {
            "default": ClassRule(
                goal=Goal.MAXIMIZE_QUALITY,
                candidates=tuple(p.name for p in profiles),
                deadline_s=0.9,
            )
        },
        "pinned": None,
        "fallback": "none",
        "ttl_s": 60.0,
        "on_controller_loss": OnControllerLoss.HOLD_LAST_GOOD,
        "prior_bytes_per_s": 125e6,
    }
    return DecisionTable(**(values | changes))


def test_each_candidate_has_its_verdict() -> None:
    """At 1.2 transfers/s over 200 Mbit/s rans is late, int8 and raw overload the link, and int4 remains."""
    decision = decide(table(), "default", native_bytes=SIZE, link=LINK)
    assert decision.selection.bound is Bound.GOAL
    verdicts = {each.name: each.verdict for each in weigh(table(), decision)}
    assert verdicts == {
        "rans": Verdict.LATE,
        "int4": Verdict.CHOSEN,
        "int8": Verdict.OVERLOADED,
        "none": Verdict.OVERLOADED,
    }


def test_fixed_choice_asks_nobody() -> None:
    """With a pinned profile the candidates were not asked, and the pinned one is the choice."""
    pinned = table(mode=Mode.PINNED, pinned="rans")
    weighed = weigh(pinned, decide(pinned, "default", native_bytes=SIZE, link=LINK))
    assert [each.verdict for each in weighed] == [Verdict.CHOSEN, *[Verdict.NOT_ASKED] * 3]


def test_explanation_is_json_and_names_what_acts() -> None:
    """An explanation survives JSON, infinities included, and says that mode Shadow does not act."""
    shadow = table(mode=Mode.SHADOW)
    decision = decide(shadow, "unheard-of", native_bytes=SIZE, link=LINK)
    value = json.loads(json.dumps(explained(shadow, decision), allow_nan=False))
    assert (value["profile"], value["wanted"], value["acts"]) == ("none", "int4", False)
    assert value["workload"] == "default"
    assert value["candidates"][3]["utilisation"] == pytest.approx(2.4)
    assert value["candidates"][1]["total_s"] == value["predicted_s"]
    assert "candidates" not in explained(None, decision)


def test_what_is_spent_of_a_deadline_makes_late() -> None:
    """Of the rest of a transfer those are late that take longer than what is left of the deadline."""
    begun = decide(table(), "default", native_bytes=SIZE, link=LINK)
    rest = begun._replace(spent_s=0.6, before_bytes_per_s=10 * LINK.bytes_per_s)
    rest = rest._replace(selection=rest.selection._replace(profile="rans", wanted="rans"))
    verdicts = {each.name: each.verdict for each in weigh(table(), rest)}
    assert verdicts["int4"] is Verdict.LATE
    value = explained(table(), rest)
    assert (value["spent_s"], value["before_bytes_per_s"]) == (0.6, 10 * LINK.bytes_per_s)
    assert explained(table(), begun)["before_bytes_per_s"] is None


def decision() -> Decision:
    """Return a decision that uses every field."""
    link = replace(
        LINK,
        backlog_bytes=3.0,
        rtt_s=0.25,
        encode_backlog_s=0.5,
        encode_factor=1.5,
        encode_delays=2.0,
        decode_delays=0.5,
        hidden_s=0.75,
    )
    made = decide(table(), "default", native_bytes=SIZE, link=link, chunks=6, wall_s=1e9)
    return made._replace(
        peer="10.0.0.1",
        incumbent="int8",
        allowance_s=0.125,
        spent_s=0.5,
        before_bytes_per_s=2e6,
    )


def test_decision_round_trip() -> None:
    """A decision survives the wire."""
    message = pb.Decision.FromString(decision_to_message(decision()).SerializeToString())
    assert decision_from_message(message) == decision()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"bytes_per_s": math.nan}, id="link"),
        pytest.param({"native_bytes": 0}, id="bytes"),
        pytest.param({"chunks": 0}, id="chunks"),
        pytest.param({"bound": "Whim"}, id="bound"),
        pytest.param({"predicted_s": -1.0}, id="time"),
        pytest.param({"wall_s": math.inf}, id="wall"),
        pytest.param({"spent_s": -1.0}, id="spent"),
        pytest.param({"before_bytes_per_s": math.nan}, id="before"),
        pytest.param({"profile": "x" * 64}, id="name"),
        pytest.param({"peer": "x" * 300}, id="peer"),
        pytest.param({"encode_factor": 0.0}, id="factor"),
        pytest.param({"hidden_s": -1.0}, id="hidden"),
    ],
)
def test_impossible_decision_is_refused(change: dict[str, Any]) -> None:
    """What can't have been decided is a typed error."""
    message = decision_to_message(decision())
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(SpecError):
        decision_from_message(message)
