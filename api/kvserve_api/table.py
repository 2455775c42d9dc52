"""The decision table: all a pod needs to choose a profile for each transfer without asking anybody."""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import total_ordering
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_api.latency import StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.profile_set import DEFAULT_CLASS, NONE
from kvserve_api.strategy import StrategyConfig

MAX_CANDIDATES: Final = 8
"""Most profiles that one workload class may choose from: the selection runs in microseconds."""


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
    """

    name: str
    strategy: StrategyConfig
    ratio: float
    loss_upper_bp: float
    encode: StageCost
    decode: StageCost
    bundle: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRule:
    """How one workload class chooses.

    Attributes:
        goal: What to optimise among the profiles that meet the deadline.
        candidates: The names of the profiles it may use, all within its quality budget.
        deadline_s: Most seconds a transfer may take to keep the SLO; infinity without one.
    """

    goal: Goal
    candidates: tuple[str, ...]
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        if not 1 <= len(self.candidates) <= MAX_CANDIDATES:
            raise SpecError("candidates", f"must be 1 to {MAX_CANDIDATES} names")
        if not self.deadline_s > 0:
            raise SpecError("deadline_s", f"must be positive, got {self.deadline_s}")


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

    def __post_init__(self) -> None:
        if DEFAULT_CLASS not in self.rules:
            raise SpecError("rules", f"must hold the class {DEFAULT_CLASS!r}")
        if not self.ttl_s > 0:
            raise SpecError("ttl_s", f"must be positive, got {self.ttl_s}")
        if not self.prior_bytes_per_s > 0:
            raise SpecError("prior_bytes_per_s", f"must be positive, got {self.prior_bytes_per_s}")
        if (self.mode == Mode.PINNED) != (self.pinned is not None):
            raise SpecError("pinned", "must be set if and only if the mode is Pinned")
        named = {NONE, self.fallback} | {n for r in self.rules.values() for n in r.candidates}
        named |= {self.pinned} if self.pinned is not None else set()
        if missing := sorted(named - set(self.candidates)):
            raise SpecError("candidates", f"must hold {', '.join(missing)}, which is referred to")

    def rule(self, workload_class: str) -> ClassRule:
        """Return the rule of a class; that of ``default`` for an unknown one."""
        return self.rules.get(workload_class) or self.rules[DEFAULT_CLASS]
