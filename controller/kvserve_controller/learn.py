"""Corrections of the profiled costs from what transfers really took."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_api.latency import StageCost
from kvserve_api.profile_set import Profile
from kvserve_controller.report import Report

PRIOR_WEIGHT: Final = 4.0
"""How many transfers the profile itself counts for: so much the corrections shrink to 1."""
FORGETTING: Final = 0.98
"""What is left of an older transfer's weight after each newer one: a memory of about 50 transfers."""
HALF_LIFE_S: Final = 600.0
"""In so many seconds half of the weight is lost, so that a profile that was slow once is tried again."""
MOST: Final = 20.0
"""Corrections stay within 1/20 to 20: a profile wrong by more needs another profiling run."""
MOST_STEP: Final = 10.0
"""One transfer counts as at most ten times slower or faster than predicted, so that an outlier can't rule."""
RESOLUTION_S: Final = 1e-3
"""Added to both times before they are compared: below a millisecond schedulers are measured, not codecs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What to multiply a profile's costs with.

    Attributes:
        encode: Of the time to encode.
        decode: Of the time to decode.
        wire: Of the wire bytes, so that it divides the ratio.
    """

    encode: float = 1.0
    decode: float = 1.0
    wire: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 1 / MOST <= value <= MOST:
                raise SpecError(field.name, f"must be within {1 / MOST} to {MOST}, got {value}")

    @staticmethod
    def scale(cost: StageCost, factor: float) -> StageCost:
        """Return the cost with all its times multiplied."""
        return StageCost(
            floor_s=cost.floor_s * factor,
            offset_s=cost.offset_s * factor,
            bytes_per_s=cost.bytes_per_s / factor,
        )


UNCORRECTED: Final = Correction()


@dataclass(slots=True)
class _Mean:
    """A forgetful mean of logarithms, shrunk to 0."""

    weight: float = 0.0
    total: float = 0.0

    def add(self, observed: float, predicted: float) -> None:
        limit = math.log(MOST_STEP)
        residual = max(-limit, min(limit, math.log(observed / predicted)))
        self.weight = self.weight * FORGETTING + 1
        self.total = self.total * FORGETTING + residual

    def fade(self, share: float) -> None:
        self.weight *= share
        self.total *= share

    @property
    def factor(self) -> float:
        value = math.exp(self.total / (self.weight + PRIOR_WEIGHT))
        return max(1 / MOST, min(MOST, value))


class Learner:
    """The corrections of one Pareto set's profiles.

    Residuals are compared with the profiled costs, never with corrected ones, so that corrections don't compound.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[_Mean, _Mean, _Mean]] = {}

    def observe(self, profile: Profile, report: Report) -> None:
        """Learn from a transfer that used the profile."""
        encode, decode, wire = self._means.setdefault(profile.name, (_Mean(), _Mean(), _Mean()))
        native = report.native_bytes
        encode.add(report.encode_s + RESOLUTION_S, profile.encode.seconds(native) + RESOLUTION_S)
        decode.add(report.decode_s + RESOLUTION_S, profile.decode.seconds(native) + RESOLUTION_S)
        wire.add(report.wire_bytes, native / profile.ratio)

    def age(self, seconds: float) -> None:
        """Let time pass: what is not confirmed by transfers is forgotten slowly."""
        share = 0.5 ** (seconds / HALF_LIFE_S)
        for means in self._means.values():
            for mean in means:
                mean.fade(share)

    def corrections(self) -> dict[str, Correction]:
        """Return what was learned, by profile name."""
        return {
            name: Correction(encode=encode.factor, decode=decode.factor, wire=wire.factor)
            for name, (encode, decode, wire) in self._means.items()
        }


def distance(old: Mapping[str, Correction], new: Mapping[str, Correction]) -> float:
    """Return the largest relative change of any correction: 0.1 for 10 % more or less."""
    most = 0.0
    for name in old.keys() | new.keys():
        before, after = old.get(name, UNCORRECTED), new.get(name, UNCORRECTED)
        for field in fields(Correction):
            change = math.log(getattr(after, field.name) / getattr(before, field.name))
            most = max(most, abs(change))
    return math.expm1(most)
