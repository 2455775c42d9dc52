"""Between the protobuf messages of the control channel and the values of `kvserve_api`.

Reading is strict: what a message leaves out or gets wrong is a `SpecError`, which a pod answers with a Nack.
"""

import json
import math
from enum import StrEnum
from typing import TypeVar

from kvserve_api.decision import Decision
from kvserve_api.errors import SpecError
from kvserve_api.latency import Link, Load, StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.selection import Bound, Selection
from kvserve_api.strategy import MAX_JSON_BYTES, StrategyConfig
from kvserve_api.table import (
    MAX_CANDIDATES,
    Candidate,
    ClassRule,
    DecisionTable,
    Doubt,
    OnControllerLoss,
    Version,
)

E = TypeVar("E", bound=StrEnum)

MAX_MESSAGE_BYTES = 1 << 20
"""Largest message either side accepts."""
MAX_NAME = 63
MAX_PEER = 253
_NOT_NEGATIVE = ("wall_s", "allowance_s", "predicted_s", "extra_s", "spent_s", "before_bytes_per_s")


def version_to_message(version: Version) -> pb.Version:
    """Translate a version."""
    return pb.Version(epoch=version.epoch, counter=version.counter)


def version_from_message(message: pb.Version) -> Version:
    """Translate a version back."""
    return Version(epoch=message.epoch, counter=message.counter)


def push_from_table(table: DecisionTable, nonce: str) -> pb.Push:
    """Translate a table into the message that pushes it."""
    return pb.Push(
        version=version_to_message(table.version),
        nonce=nonce,
        table=pb.DecisionTable(
            policy=table.policy,
            mode=table.mode.value,
            candidates=[_candidate_to_message(c) for c in table.candidates.values()],
            rules={name: _rule_to_message(rule) for name, rule in table.rules.items()},
            pinned=table.pinned or "",
            fallback=table.fallback,
            ttl_s=table.ttl_s,
            on_controller_loss=table.on_controller_loss.value,
            prior_bytes_per_s=table.prior_bytes_per_s,
            hysteresis=table.hysteresis,
        ),
    )


def table_from_push(push: pb.Push) -> DecisionTable:
    """Translate a pushed message back into a table.

    Raises:
        SpecError: The table is inconsistent or of a form this version does not know.
    """
    message = push.table
    return DecisionTable(
        version=version_from_message(push.version),
        policy=message.policy,
        mode=_enum(Mode, message.mode, "mode"),
        candidates={c.name: _candidate_from_message(c) for c in message.candidates},
        rules={name: _rule_from_message(rule) for name, rule in message.rules.items()},
        pinned=message.pinned or None,
        fallback=message.fallback,
        ttl_s=message.ttl_s,
        on_controller_loss=_enum(
            OnControllerLoss, message.on_controller_loss, "on_controller_loss"
        ),
        prior_bytes_per_s=message.prior_bytes_per_s,
        hysteresis=message.hysteresis,
    )


def _candidate_to_message(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(
        name=candidate.name,
        strategy=candidate.strategy.canonical(),
        ratio=candidate.ratio,
        loss_upper_bp=candidate.loss_upper_bp,
        encode=_cost_to_message(candidate.encode),
        decode=_cost_to_message(candidate.decode),
        bundle=candidate.bundle or "",
        encode_doubt=candidate.doubt.encode,
        decode_doubt=candidate.doubt.decode,
        wire_doubt=candidate.doubt.wire,
    )


def _candidate_from_message(message: pb.Candidate) -> Candidate:
    path = f"candidates.{message.name}"
    if len(message.strategy) > MAX_JSON_BYTES:
        raise SpecError(f"{path}.strategy", f"has more than {MAX_JSON_BYTES} bytes")
    try:
        strategy = json.loads(message.strategy)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}.strategy", f"is not JSON: {error}") from error
    if not (message.ratio > 0 and math.isfinite(message.ratio)):
        raise SpecError(f"{path}.ratio", f"must be positive, got {message.ratio}")
    if not (message.loss_upper_bp >= 0 and math.isfinite(message.loss_upper_bp)):
        raise SpecError(f"{path}.loss_upper_bp", f"must not be negative: {message.loss_upper_bp}")
    return Candidate(
        name=message.name,
        strategy=StrategyConfig.from_json(strategy, f"{path}.strategy"),
        ratio=message.ratio,
        loss_upper_bp=message.loss_upper_bp,
        encode=_cost_from_message(message.encode),
        decode=_cost_from_message(message.decode),
        bundle=message.bundle or None,
        doubt=Doubt(
            encode=message.encode_doubt, decode=message.decode_doubt, wire=message.wire_doubt
        ),
    )


def _cost_to_message(cost: StageCost) -> pb.StageCost:
    return pb.StageCost(
        floor_s=cost.floor_s,
        offset_s=cost.offset_s,
        bytes_per_s=0.0 if math.isinf(cost.bytes_per_s) else cost.bytes_per_s,
    )


def _cost_from_message(message: pb.StageCost) -> StageCost:
    return StageCost(
        floor_s=message.floor_s,
        offset_s=message.offset_s,
        bytes_per_s=message.bytes_per_s or math.inf,
    )


def _rule_to_message(rule: ClassRule) -> pb.ClassRule:
    return pb.ClassRule(
        goal=rule.goal.value,
        candidates=rule.candidates,
        deadline_s=0.0 if math.isinf(rule.deadline_s) else rule.deadline_s,
        margins=dict(rule.margins),
        explore_share=rule.explore_share,
    )


def _rule_from_message(message: pb.ClassRule) -> ClassRule:
    return ClassRule(
        goal=_enum(Goal, message.goal, "rules.goal"),
        candidates=tuple(message.candidates),
        deadline_s=message.deadline_s or math.inf,
        margins=dict(message.margins),
        explore_share=message.explore_share,
    )


def decision_to_message(decision: Decision) -> pb.Decision:
    """Translate a decision."""
    link, selection = decision.link, decision.selection
    return pb.Decision(
        wall_s=decision.wall_s,
        version=version_to_message(decision.version),
        peer=decision.peer,
        workload=decision.workload,
        native_bytes=decision.native_bytes,
        chunks=decision.chunks,
        bytes_per_s=link.bytes_per_s,
        backlog_bytes=link.backlog_bytes,
        rtt_s=link.rtt_s,
        encode_backlog_s=link.encode_backlog_s,
        decode_backlog_s=link.decode_backlog_s,
        arrivals_per_s=link.load.arrivals_per_s,
        native_bytes_per_s=link.load.native_bytes_per_s,
        encoder_arrivals_per_s=link.encoder_load.arrivals_per_s,
        encoder_native_bytes_per_s=link.encoder_load.native_bytes_per_s,
        encode_factor=link.encode_factor,
        encode_delays=link.encode_delays,
        decode_delays=link.decode_delays,
        hidden_s=link.hidden_s,
        candidates=decision.candidates,
        incumbent=decision.incumbent,
        allowance_s=decision.allowance_s,
        profile=selection.profile,
        wanted=selection.wanted,
        bound=selection.bound.value,
        predicted_s=selection.predicted_s,
        extra_s=selection.extra_s,
        spent_s=decision.spent_s,
        before_bytes_per_s=decision.before_bytes_per_s,
    )


def decision_from_message(message: pb.Decision) -> Decision:
    """Translate a decision back.

    Raises:
        SpecError: It can't have been made.
    """
    names = (message.profile, message.wanted, message.incumbent, *message.candidates)
    if len(message.candidates) > MAX_CANDIDATES or any(len(name) > MAX_NAME for name in names):
        raise SpecError("candidates", f"must be {MAX_CANDIDATES} names of {MAX_NAME} characters")
    if len(message.peer) > MAX_PEER or len(message.workload) > MAX_NAME:
        raise SpecError("peer", "and workload must be names")
    if not (message.native_bytes > 0 and message.chunks > 0):
        raise SpecError("native_bytes", "and chunks must be positive")
    for name in _NOT_NEGATIVE:
        if not 0 <= getattr(message, name) < math.inf:
            raise SpecError(name, f"must be finite and not negative: {getattr(message, name)}")
    return Decision(
        wall_s=message.wall_s,
        version=version_from_message(message.version),
        peer=message.peer,
        workload=message.workload,
        native_bytes=message.native_bytes,
        chunks=message.chunks,
        link=Link(
            bytes_per_s=message.bytes_per_s,
            backlog_bytes=message.backlog_bytes,
            rtt_s=message.rtt_s,
            encode_backlog_s=message.encode_backlog_s,
            decode_backlog_s=message.decode_backlog_s,
            load=Load(
                arrivals_per_s=message.arrivals_per_s,
                native_bytes_per_s=message.native_bytes_per_s,
            ),
            encoder_load=Load(
                arrivals_per_s=message.encoder_arrivals_per_s,
                native_bytes_per_s=message.encoder_native_bytes_per_s,
            ),
            encode_factor=message.encode_factor,
            encode_delays=message.encode_delays,
            decode_delays=message.decode_delays,
            hidden_s=message.hidden_s,
        ),
        candidates=tuple(message.candidates),
        incumbent=message.incumbent,
        allowance_s=message.allowance_s,
        selection=Selection(
            profile=message.profile,
            wanted=message.wanted,
            bound=_enum(Bound, message.bound, "bound"),
            predicted_s=message.predicted_s,
            extra_s=message.extra_s,
        ),
        spent_s=message.spent_s,
        before_bytes_per_s=message.before_bytes_per_s,
    )


def _enum(kind: type[E], value: str, path: str) -> E:
    try:
        return kind(value)
    except ValueError as error:
        choices = ", ".join(member.value for member in kind)
        raise SpecError(path, f"must be one of {choices}, got {value!r}") from error
