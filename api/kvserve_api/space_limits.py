"""Which strategies a policy lets a profiling run measure."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self

from kvserve_api.fields import Fields
from kvserve_api.profile_set import NAME_PATTERN, NONE

FAMILIES: Final = (
    "joint",
    "focus",
    "apart",
    "centred",
    "predicted",
    "minmax",
    "absmax",
    "lloyd",
    "fp8",
    "split",
    "lossless",
    "cachegen",
)
"""The families of the strategy space; that of ``none`` is always there."""
MAX_ENTRIES: Final = 64
MAX_ENTRY: Final = 63


class Allow(StrEnum):
    """What kind of strategies may be measured."""

    ANY = "Any"
    UNCALIBRATED = "Uncalibrated"
    LOSSLESS = "Lossless"


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategySelector:
    """A choice of strategies: those that any of its entries names.

    Attributes:
        families: Families of the strategy space.
        names: Names of profiles: of presets or of points of the space.
        stages: Ids of stages; a strategy is chosen if one of its stages is.
    """

    families: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether it names anything."""
        return bool(self.families or self.names or self.stages)

    def chooses(self, *, family: str, name: str, stages: Collection[str]) -> bool:
        """Tell whether a strategy is among the chosen."""
        return (
            family in self.families
            or name in self.names
            or any(stage in stages for stage in self.stages)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the choice as an object."""
        lists = (("families", self.families), ("names", self.names), ("stages", self.stages))
        return {key: list(entries) for key, entries in lists if entries}

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read a choice."""
        selector = cls(
            families=_entries(fields, "families"),
            names=_entries(fields, "names"),
            stages=_entries(fields, "stages"),
        )
        for family in selector.families:
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise fields.fail("families", f"holds {family!r}, which is none of {known}")
        for name in selector.names:
            if not NAME_PATTERN.fullmatch(name):
                raise fields.fail("names", f"must hold DNS labels, got {name!r}")
        fields.done()
        return selector


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceLimits:
    """What a policy leaves of the strategy space; ``none`` is always left.

    Attributes:
        allow: What kind of strategies.
        include: Only these, if it names any.
        exclude: Not these.
    """

    allow: Allow = Allow.ANY
    include: StrategySelector = field(default_factory=StrategySelector)
    exclude: StrategySelector = field(default_factory=StrategySelector)

    @property
    def whole(self) -> bool:
        """The space is as it is."""
        return self == SpaceLimits()

    def to_json(self) -> dict[str, Any]:
        """Return the limits as an object."""
        parts = (("include", self.include), ("exclude", self.exclude))
        return {"allow": str(self.allow)} | {k: part.to_json() for k, part in parts if part}

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the limits, from a policy or from a run's inputs."""
        limits = cls(
            allow=Allow(fields.string("allow", Allow.ANY.value, choices=list(Allow))),
            include=StrategySelector.read(fields.child("include", {})),
            exclude=StrategySelector.read(fields.child("exclude", {})),
        )
        if NONE in limits.exclude.names:
            raise fields.fail("exclude.names", f"may not hold {NONE}: every set has it")
        fields.done()
        return limits


def _entries(fields: Fields, key: str) -> tuple[str, ...]:
    entries = fields.items(key, [], max_items=MAX_ENTRIES)
    if not all(isinstance(entry, str) and 0 < len(entry) <= MAX_ENTRY for entry in entries):
        raise fields.fail(key, f"must be a list of strings of 1 to {MAX_ENTRY} characters")
    if len(set(entries)) < len(entries):
        raise fields.fail(key, "must not hold an entry twice")
    return tuple(entries)
