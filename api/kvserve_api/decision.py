"""One decision of a pod, and its explanation: what every candidate was held to be, and what ruled it out."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from kvserve_api.latency import MOST_UTILISATION, Link, Prediction, predict
from kvserve_api.policy import Mode
from kvserve_api.profile_set import DEFAULT_CLASS
from kvserve_api.selection import Bound, Selection, select
from kvserve_api.table import DecisionTable, Version


class Decision(NamedTuple):
    """What a pod knew when it chose, and what it chose: enough to choose again.

    Attributes:
        wall_s: When, in seconds since 1970.
        version: Of the table that decided.
        peer: Address of the consumer.
        workload: The workload class.
        native_bytes: Native KV bytes of the transfer, or of the rest for which it was chosen.
        chunks: Into how many chunks that was planned to be cut.
        link: The link as it was known.
        candidates: What could be chosen: those of the class that the consumer can decode.
        incumbent: The profile in use before; empty if none.
        allowance_s: What trying out might cost, in seconds.
        selection: What was chosen, and why.
        spent_s: Seconds of the deadline that had passed, where it was chosen for the rest of a transfer.
        before_bytes_per_s: The goodput for which the transfer had been chosen before; 0 if it had not begun.
    """

    wall_s: float
    version: Version
    peer: str
    workload: str
    native_bytes: int
    chunks: int
    link: Link
    candidates: tuple[str, ...]
    incumbent: str
    allowance_s: float
    selection: Selection
    spent_s: float = 0.0
    before_bytes_per_s: float = 0.0


class Verdict(StrEnum):
    """What became of a candidate."""

    CHOSEN = "Chosen"
    WORSE = "Worse"
    LATE = "Late"
    OVERLOADED = "Overloaded"
    NOT_ASKED = "NotAsked"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """A candidate as it was held to be.

    Attributes:
        name: Its name.
        ratio: Native bytes over wire bytes.
        loss_upper_bp: Upper confidence limit of its quality loss, in basis points.
        prediction: Of the transfer.
        percentile_s: What of the transfer comes after its prefill's end at the SLO's percentile, in seconds; held
            against the deadline.
        verdict: What became of it.
    """

    name: str
    ratio: float
    loss_upper_bp: float
    prediction: Prediction
    percentile_s: float
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return it as an object; times in seconds."""
        p = self.prediction
        return {
            "name": self.name,
            "ratio": self.ratio,
            "loss_upper_bp": self.loss_upper_bp,
            "encode_s": p.encode_s,
            "wire_s": p.wire_s,
            "decode_s": p.decode_s,
            "wait_s": p.wait_s,
            "total_s": p.total_s,
            "percentile_s": self.percentile_s,
            "others_s": p.others_s,
            "utilisation": p.utilisation,
            "verdict": self.verdict.value,
        }


_MERITS: Final = frozenset({Bound.GOAL, Bound.KEPT, Bound.EXPLORED, Bound.DEADLINE, Bound.UNSTABLE})


def weigh(table: DecisionTable, decision: Decision) -> tuple[Weighed, ...]:
    """Return how the candidates of a decision compare by its table, in the order of the table."""
    rule = table.rule(decision.workload)
    chosen = decision.selection.wanted
    merits = decision.selection.bound in _MERITS
    weighed = []
    for name in decision.candidates:
        candidate = table.candidates.get(name)
        if candidate is None:
            continue
        prediction = predict(
            native_bytes=decision.native_bytes,
            ratio=candidate.ratio,
            encode=candidate.encode,
            decode=candidate.decode,
            link=decision.link,
            chunks=decision.chunks,
        )
        percentile_s = prediction.exposed_s(
            decision.link.hidden_s, decision.chunks, rule.margins.get(name, 1.0)
        )
        if name == chosen:
            verdict = Verdict.CHOSEN
        elif not merits:
            verdict = Verdict.NOT_ASKED
        elif prediction.utilisation > MOST_UTILISATION:
            verdict = Verdict.OVERLOADED
        elif percentile_s > rule.deadline_s - decision.spent_s:
            verdict = Verdict.LATE
        else:
            verdict = Verdict.WORSE
        weighed.append(
            Weighed(
                name=name,
                ratio=candidate.ratio,
                loss_upper_bp=candidate.loss_upper_bp,
                prediction=prediction,
                percentile_s=percentile_s,
                verdict=verdict,
            )
        )
    return tuple(weighed)


def decide(
    table: DecisionTable,
    workload: str,
    *,
    native_bytes: int,
    link: Link,
    chunks: int = 1,
    wall_s: float = 0.0,
) -> Decision:
    """Return the decision that a pod would make by a table, for one of its own."""
    known = workload if workload in table.rules else DEFAULT_CLASS
    return Decision(
        wall_s=wall_s,
        version=table.version,
        peer="",
        workload=known,
        native_bytes=native_bytes,
        chunks=chunks,
        link=link,
        candidates=table.rules[known].candidates,
        incumbent="",
        allowance_s=0.0,
        selection=select(table, known, native_bytes=native_bytes, link=link, chunks=chunks),
    )


def explained(table: DecisionTable | None, decision: Decision) -> dict[str, Any]:
    """Return a decision with all that led to it, as JSON; without its table, only what the pod itself said.

    Args:
        table: The table of the decision's version.
        decision: The decision.
    """
    link, selection = decision.link, decision.selection
    value: dict[str, Any] = {
        "time_s": decision.wall_s,
        "version": str(decision.version),
        "peer": decision.peer,
        "workload": decision.workload,
        "native_bytes": decision.native_bytes,
        "chunks": decision.chunks,
        "link": {
            "bytes_per_s": link.bytes_per_s,
            "backlog_bytes": link.backlog_bytes,
            "rtt_s": link.rtt_s,
            "encode_backlog_s": link.encode_backlog_s,
            "decode_backlog_s": link.decode_backlog_s,
            "arrivals_per_s": link.load.arrivals_per_s,
            "native_bytes_per_s": link.load.native_bytes_per_s,
            "encoder_arrivals_per_s": link.encoder_load.arrivals_per_s,
            "encoder_native_bytes_per_s": link.encoder_load.native_bytes_per_s,
            "encode_factor": link.encode_factor,
            "encode_delays": link.encode_delays,
            "decode_delays": link.decode_delays,
            "hidden_s": link.hidden_s,
        },
        "incumbent": decision.incumbent or None,
        "allowance_s": decision.allowance_s,
        "spent_s": decision.spent_s,
        "before_bytes_per_s": decision.before_bytes_per_s or None,
        "profile": selection.profile,
        "wanted": selection.wanted,
        "bound": selection.bound.value,
        "predicted_s": selection.predicted_s,
        "extra_s": selection.extra_s,
    }
    if table is None:
        return value
    rule = table.rule(decision.workload)
    return value | {
        "policy": table.policy,
        "mode": table.mode.value,
        "acts": table.mode is not Mode.SHADOW,
        "goal": rule.goal.value,
        "deadline_s": rule.deadline_s if rule.deadline_s < float("inf") else None,
        "hysteresis": table.hysteresis,
        "candidates": [each.to_json() for each in weigh(table, decision)],
    }
