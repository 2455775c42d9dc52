"""The decision table: all a pod needs to choose a profile for each transfer without asking anybody."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import total_ordering
from typing import Final, TypeAlias

from kvserve_api.errors import SpecError
from kvserve_api.latency import StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_api.strategy import StrategyConfig

MAX_CANDIDATES: Final = 8
"""Most profiles that one workload class may choose from: the selection runs in microseconds."""
HOPE: Final = 1.0
"""A candidate is tried out for what it would be so many standard deviations better than believed."""
MAX_DOUBT: Final = 5.0
"""Largest standard deviation of a logarithm: more than a factor of 100 either way is no knowledge."""


@total_ordering
@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """The version of a table; it never goes back, over restarts neither.

    Attributes:
        epoch: Grows with each start of a controller.
        counter: Grows with each table of one controller.
    """

    epoch: int
    counter: int

    def __lt__(self, other: "Version") -> bool:
        """Order by epoch, then by counter."""
        return (self.epoch, self.counter) < (other.epoch, other.counter)

    def __str__(self) -> str:
        """Return ``epoch.counter``."""
        return f"{self.epoch}.{self.counter}"

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read ``epoch.counter``."""
        epoch, dot, counter = text.partition(".")
        if not (dot and epoch.isdecimal() and counter.isdecimal()):
            raise SpecError("version", f"must look like 3.14, got {text!r}")
        return cls(epoch=int(epoch), counter=int(counter))


class Role(StrEnum):
    """What a serving pod does."""

    PREFILL = "Prefill"
    DECODE = "Decode"


class OnControllerLoss(StrEnum):
    """What a pod does when its table's time to live has passed without news."""

    HOLD_LAST_GOOD = "HoldLastGood"
    REVERT = "Revert"


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """How unsure the corrections of a candidate are: standard deviations of their natural logarithms.

    Attributes:
        encode: Of the time to encode.
        decode: Of the time to decode.
        wire: Of the wire bytes.
    """

    encode: float = 0.0
    decode: float = 0.0
    wire: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value <= MAX_DOUBT:
                raise SpecError(each.name, f"must be within 0 to {MAX_DOUBT:g}, got {value}")


CERTAIN: Final = Doubt()


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A profile as a pod needs it, costs corrected by what was learned online.

    Attributes:
        name: The profile's name.
        strategy: What to do.
        ratio: Native bytes over wire bytes.
        loss_upper_bp: Upper confidence limit of the quality loss, in basis points.
        encode: Cost on the producer.
        decode: Cost on the consumer.
        bundle: Digest of the calibration bundle it needs, or None.
        doubt: How unsure costs and ratio are.
    """

    name: str
    strategy: StrategyConfig
    ratio: float
    loss_upper_bp: float
    encode: StageCost
    decode: StageCost
    bundle: str | None = None
    doubt: Doubt = CERTAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRule:
    """How one workload class chooses.

    Attributes:
        goal: What to optimise among the profiles that meet the deadline.
        candidates: The names of the profiles it may use, all within its quality budget.
        deadline_s: Most seconds a transfer may take to keep the SLO; infinity without one.
        margins: By candidate, what its predicted time is multiplied with before it is held against the deadline: so
            much longer it may take at the SLO's percentile. 1 for a candidate that is not named.
        explore_share: Trying out candidates that could be better than is known may be expected to cost so much of the
            transfers' time.
    """

    goal: Goal
    candidates: tuple[str, ...]
    deadline_s: float = math.inf
    margins: Mapping[str, float] = field(default_factory=dict)
    explore_share: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.candidates) <= MAX_CANDIDATES:
            raise SpecError("candidates", f"must be 1 to {MAX_CANDIDATES} names")
        if not self.deadline_s > 0:
            raise SpecError("deadline_s", f"must be positive, got {self.deadline_s}")
        for name, margin in self.margins.items():
            if not (name in self.candidates and 1 <= margin < math.inf):
                raise SpecError("margins", f"{name!r} must be a candidate's, at least 1: {margin}")
        if not 0 <= self.explore_share <= 0.5:
            raise SpecError("explore_share", f"must be within 0 to 0.5, got {self.explore_share}")


Row: TypeAlias = tuple[
    str,
    float,
    float,
    float,
    float,
    float,
    float,
    float,
    float,
    float | None,
    float,
    tuple[float, float, float],
    int,
]
"""A candidate of a rule, unfolded: a transfer waits while rows are compared, and Python takes a plain tuple apart in a
third of the time that one with names takes.

Name; ratio; floor (s), offset (s) and speed (bytes/s) of encoding, then of decoding; margin; what the goal minimises if
that is no time, None if it is; upper limit of the loss (basis points); what is left of the time to encode, of the wire
bytes and of the time to decode, were each better than believed by `HOPE` standard deviations; place among the rule's
candidates, the first of which wins where all is equal.
"""


def _row(candidate: Candidate, rule: ClassRule, order: int) -> Row:
    merits = {
        Goal.MINIMIZE_LATENCY: None,
        Goal.MAXIMIZE_QUALITY: candidate.loss_upper_bp,
        Goal.MINIMIZE_BYTES: -candidate.ratio,
    }
    encode, decode, doubt = candidate.encode, candidate.decode, candidate.doubt
    return (
        candidate.name,
        candidate.ratio,
        encode.floor_s,
        encode.offset_s,
        encode.bytes_per_s,
        decode.floor_s,
        decode.offset_s,
        decode.bytes_per_s,
        rule.margins.get(candidate.name, 1.0),
        merits[rule.goal],
        candidate.loss_upper_bp,
        (
            math.exp(-HOPE * doubt.encode),
            math.exp(-HOPE * doubt.wire),
            math.exp(-HOPE * doubt.decode),
        ),
        order,
    )


def _led(rows: tuple[Row, ...]) -> Mapping[str | None, tuple[Row, ...]]:
    """Return the rows for each of them in use, that one first, and for none; the others as a choice gets done soonest.

    What is in use is seldom far from the best, and the sooner that is known the fewer need to be looked at closely.
    After it come the least merits, or if that is a time the largest ratios: where the wire alone takes too long it does
    for all that follow.
    """

    def promise(row: Row) -> tuple[float, int]:
        _, ratio, *_, merit, _, _, order = row
        return (-ratio if merit is None else merit, order)

    best = sorted(rows, key=promise)
    led: dict[str | None, tuple[Row, ...]] = {None: tuple(best)}
    for row in rows:
        led[row[0]] = (row, *(other for other in best if other is not row))
    return led


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionTable:
    """What the controller pushes to a pod.

    Attributes:
        version: See `Version`.
        policy: ``namespace/name`` of the policy it was compiled from.
        mode: Whether choices act, are only reported, or are fixed.
        candidates: Every profile that a rule names, by name; always with ``none``.
        rules: For each workload class its rule; always with ``default``.
        pinned: The profile in mode Pinned.
        fallback: The profile when nothing else applies.
        ttl_s: How long the table holds without news from the controller, in seconds.
        on_controller_loss: What applies after that.
        prior_bytes_per_s: Goodput to assume for a link nobody has measured yet.
        hysteresis: By what share another profile must be better than the one in use to take its place.
        rows: For each workload class, and each of its candidates in use or None, all of them unfolded, in the order in
            which a choice is to look at them; made from the rest.

    Raises:
        SpecError: A name is not among the candidates, or the default rule is missing.
    """

    version: Version
    policy: str
    mode: Mode
    candidates: dict[str, Candidate]
    rules: dict[str, ClassRule]
    pinned: str | None
    fallback: str
    ttl_s: float
    on_controller_loss: OnControllerLoss
    prior_bytes_per_s: float
    hysteresis: float = 0.0
    rows: Mapping[str, Mapping[str | None, tuple[Row, ...]]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if DEFAULT_CLASS not in self.rules:
            raise SpecError("rules", f"must hold the class {DEFAULT_CLASS!r}")
        if not self.ttl_s > 0:
            raise SpecError("ttl_s", f"must be positive, got {self.ttl_s}")
        if not self.prior_bytes_per_s > 0:
            raise SpecError("prior_bytes_per_s", f"must be positive, got {self.prior_bytes_per_s}")
        if not 0 <= self.hysteresis <= 1:
            raise SpecError("hysteresis", f"must be within 0 to 1, got {self.hysteresis}")
        if (self.mode == Mode.PINNED) != (self.pinned is not None):
            raise SpecError("pinned", "must be set if and only if the mode is Pinned")
        named = {NONE, self.fallback} | {n for r in self.rules.values() for n in r.candidates}
        named |= {self.pinned} if self.pinned is not None else set()
        if missing := sorted(named - set(self.candidates)):
            raise SpecError("candidates", f"must hold {', '.join(missing)}, which is referred to")
        rows = {
            name: _led(
                tuple(
                    _row(self.candidates[each], rule, order)
                    for order, each in enumerate(rule.candidates)
                )
            )
            for name, rule in self.rules.items()
        }
        object.__setattr__(self, "rows", rows)

    def rule(self, workload_class: str) -> ClassRule:
        """Return the rule of a class; that of ``default`` for an unknown one."""
        return self.rules.get(workload_class) or self.rules[DEFAULT_CLASS]
