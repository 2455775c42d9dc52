"""The selection law: which profile one transfer uses, by the pushed table and the live link.

A pure function of values, evaluated in the serving pod for each transfer; no clock, no network, no randomness.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvserve_api.latency import Link, total_s
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import NONE
from kvserve_api.table import Candidate, DecisionTable


class Bound(StrEnum):
    """What decided a selection."""

    GOAL = "Goal"
    DEADLINE = "DeadlineUnmet"
    PINNED = "Pinned"
    OFF = "Off"
    EXPIRED = "TableExpired"
    NO_TABLE = "NoTable"
    PEER = "PeerCannotDecode"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What was chosen for one transfer, and why.

    Attributes:
        profile: The name of the profile to use.
        wanted: The name the policy would use if it acted; differs from ``profile`` in mode Shadow only.
        bound: What decided.
        predicted_s: The predicted time of ``wanted``, in seconds; 0 where nothing was predicted.
    """

    profile: str
    wanted: str
    bound: Bound
    predicted_s: float = 0.0


RAW = Selection(profile=NONE, wanted=NONE, bound=Bound.NO_TABLE)
"""The selection of a pod that has no table."""


def select(
    table: DecisionTable,
    workload_class: str,
    *,
    native_bytes: int,
    link: Link,
    chunks: int = 1,
    expired: bool = False,
    decodable: frozenset[str] | None = None,
) -> Selection:
    """Choose a profile for one transfer.

    Among the class's candidates (all within the quality budget): those that meet the deadline compete by the goal; if
    none meets it, the fastest wins, because missing by less is better than giving up.

    Args:
        table: The last acknowledged table.
        workload_class: The request's class.
        native_bytes: Native KV bytes of the transfer.
        link: The link as measured now.
        chunks: Into how many chunks the transfer is cut.
        expired: The table's time to live has passed and the table says to revert then.
        decodable: Digests of the strategies that the consumer can decode; None if all.
    """
    if table.mode == Mode.OFF:
        return Selection(profile=NONE, wanted=NONE, bound=Bound.OFF)
    if expired:
        return _fixed(table, table.fallback, Bound.EXPIRED, decodable)
    if table.pinned is not None:
        return _fixed(table, table.pinned, Bound.PINNED, decodable)

    rule = table.rule(workload_class)
    best: Candidate | None = None
    best_key: tuple[bool, float, float] | None = None
    best_s = 0.0
    for name in rule.candidates:
        candidate = table.candidates[name]
        if decodable is not None and candidate.strategy.digest not in decodable and name != NONE:
            continue
        seconds = total_s(
            native_bytes, candidate.ratio, candidate.encode, candidate.decode, link, chunks
        )
        late = seconds > rule.deadline_s
        key = (late, seconds if late else _merit(rule.goal, candidate, seconds), seconds)
        if best_key is None or key < best_key:
            best, best_key, best_s = candidate, key, seconds
    if best is None or best_key is None:
        return _fixed(table, table.fallback, Bound.PEER, decodable)
    bound = Bound.DEADLINE if best_key[0] else Bound.GOAL
    acts = NONE if table.mode == Mode.SHADOW else best.name
    return Selection(profile=acts, wanted=best.name, bound=bound, predicted_s=best_s)


def _merit(goal: Goal, candidate: Candidate, seconds: float) -> float:
    """Return what to minimise among the candidates that meet the deadline."""
    match goal:
        case Goal.MINIMIZE_LATENCY:
            return seconds
        case Goal.MAXIMIZE_QUALITY:
            return candidate.loss_upper_bp
        case Goal.MINIMIZE_BYTES:
            return -candidate.ratio


def _fixed(
    table: DecisionTable, name: str, bound: Bound, decodable: frozenset[str] | None
) -> Selection:
    """Return a profile that was not chosen by merit, or raw if the consumer can't decode it."""
    if decodable is not None and table.candidates[name].strategy.digest not in decodable:
        return Selection(profile=NONE, wanted=name, bound=Bound.PEER)
    acts = NONE if table.mode == Mode.SHADOW else name
    return Selection(profile=acts, wanted=name, bound=bound)
