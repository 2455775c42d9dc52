"""Corrections of the profiled costs from what transfers really took.

The logarithm of observed over profiled time is a sum of effects: one that all profiles share, one of the machine, one
of the profile. A machine that became slow so corrects all profiles at once, also those it has not used; and a profile
that nobody has used shrinks to what the others taught. Wire bytes have no machine.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.latency import StageCost
from kvserve_api.profile_set import NONE, Profile
from kvserve_api.table import CERTAIN, MAX_DOUBT, Doubt
from kvserve_controller.belief import HALF_LIFE_S, Belief, Noise, measure, numbers
from kvserve_controller.report import Report

MOST: Final = 20.0
"""Corrections stay within 1/20 to 20: a profile wrong by more needs another profiling run."""
MOST_STEP: Final = 100.0
"""One transfer counts as at most so many times slower or faster than profiled."""
RESOLUTION_S: Final = 1e-3
"""Added to both times before they are compared: below a millisecond schedulers are measured, not codecs."""
MAX_MACHINES: Final = 2048
"""Most machines whose effects are remembered; of more, the least recently seen are forgotten."""

MAX_SAVED: Final = 512
"""So many of them, seen last, are kept in a checkpoint."""
DRIFT: Final = 1.5
"""A stage that takes more than so many times as long as profiled, or as many times shorter, has drifted."""
SURE: Final = 3.0
"""So many standard deviations must lie between what is believed and what was profiled."""

STAGES: Final = ("encode", "decode", "wire")
# how much effects are expected to scatter before anything was measured, and how fast they change
_SHARED: Final = {"encode": (0.35, 0.01), "decode": (0.35, 0.01), "wire": (0.10, 0.001)}
_MACHINE: Final = {"encode": (0.20, 0.01), "decode": (0.20, 0.01)}
_PROFILE: Final = {"encode": (0.25, 0.001), "decode": (0.25, 0.001), "wire": (0.15, 0.001)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What to multiply a profile's costs with, and how sure that is.

    Attributes:
        encode: Of the time to encode.
        decode: Of the time to decode.
        wire: Of the wire bytes, so that it divides the ratio.
        doubt: Standard deviations of their logarithms.
    """

    encode: float = 1.0
    decode: float = 1.0
    wire: float = 1.0
    doubt: Doubt = CERTAIN

    def __post_init__(self) -> None:
        for stage in STAGES:
            value = getattr(self, stage)
            if not 1 / MOST <= value <= MOST:
                raise SpecError(stage, f"must be within {1 / MOST} to {MOST}, got {value}")

    @staticmethod
    def scale(cost: StageCost, factor: float) -> StageCost:
        """Return the cost with all its times multiplied."""
        return StageCost(
            floor_s=cost.floor_s * factor,
            offset_s=cost.offset_s * factor,
            bytes_per_s=cost.bytes_per_s / factor,
        )


UNCORRECTED: Final = Correction()


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """A stage of a profile that is not what it was profiled to be.

    Attributes:
        profile: The profile's name.
        stage: ``encode``, ``decode`` or ``wire``.
        factor: Observed over profiled.
    """

    profile: str
    stage: str
    factor: float

    def __str__(self) -> str:
        """Say it in a few words."""
        what = "wire bytes" if self.stage == "wire" else f"time to {self.stage}"
        return f"{self.profile}: {what} {self.factor:.1f}x the profiled"


class Learner:
    """The corrections of one Pareto set's profiles.

    Residuals are compared with the profiled costs, never with corrected ones, so that corrections don't compound.

    Attributes:
        changes: How often a stage was found to have become another, by stage.
    """

    def __init__(self) -> None:
        self._noise: dict[tuple[str, str], Noise] = {}
        self._shared = {stage: Belief(*_SHARED[stage]) for stage in STAGES}
        self._profiles: dict[tuple[str, str], Belief] = {}
        self._machines: dict[tuple[str, str], Belief] = {}
        self.changes = dict.fromkeys(STAGES, 0)

    def observe(self, profile: Profile, report: Report, consumer: str = "") -> None:
        """Learn from a transfer that used the profile.

        Args:
            profile: As it was measured.
            report: What happened.
            consumer: The pod that reported it.
        """
        native = report.native_bytes
        for stage, machine, observed, profiled in (
            ("encode", report.producer, report.encode_s, profile.encode.seconds(native)),
            ("decode", consumer, report.decode_s, profile.decode.seconds(native)),
        ):
            residual = math.log((observed + RESOLUTION_S) / (profiled + RESOLUTION_S))
            self._measure(stage, profile.name, machine, residual)
        self._measure(
            "wire", profile.name, "", math.log(report.wire_bytes * profile.ratio / native)
        )

    def age(self, seconds: float) -> None:
        """Let time pass: what is not confirmed by transfers is forgotten slowly."""
        share = 0.5 ** (seconds / HALF_LIFE_S)
        for effects in (self._shared, self._profiles, self._machines):
            for effect in effects.values():
                effect.fade(share)

    def corrections(self, names: Iterable[str]) -> dict[str, Correction]:
        """Return what is believed of profiles on the machines seen lately, by name."""
        machine = {stage: self._usual_machine(stage) for stage in _MACHINE}
        return {name: self._correction(name, machine) for name in names}

    def drifted(self, names: Iterable[str]) -> tuple["Drift", ...]:
        """Return what is surely far from what was profiled, farthest first; copying is not profiled for its time."""
        found = [
            Drift(profile=name, stage=stage, factor=getattr(correction, stage))
            for name, correction in self.corrections(names).items()
            for stage in STAGES
            if name != NONE
            and (stage, name) in self._profiles
            and abs(math.log(getattr(correction, stage)))
            > max(math.log(DRIFT), SURE * getattr(correction.doubt, stage))
        ]
        return tuple(sorted(found, key=lambda d: (-abs(math.log(d.factor)), d.profile, d.stage)))

    def machines(self, stage: str) -> dict[str, float]:
        """Return by how much each machine differs from the usual one at a stage, as a factor."""
        usual, _ = self._usual_machine(stage)
        return {
            name: math.exp(effect.mean - usual)
            for (of, name), effect in self._machines.items()
            if of == stage
        }

    def to_json(self) -> dict[str, Any]:
        """Return all that was learned, for a checkpoint."""
        return {
            "shared": {stage: effect.to_json() for stage, effect in self._shared.items()},
            "profiles": _nested(self._profiles),
            "machines": _nested(dict(list(self._machines.items())[-MAX_SAVED:])),
            "noise": _nested(dict(list(self._noise.items())[-MAX_SAVED:])),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> "Learner":
        """Read what `to_json` returned.

        Raises:
            SpecError: It is damaged, or of another form.
        """
        learner = cls()
        shared = fields.child("shared")
        for stage in STAGES:
            learner._shared[stage] = _restored(shared, stage, _SHARED[stage])
        shared.done()
        for key, effects, priors in (
            ("profiles", learner._profiles, _PROFILE),
            ("machines", learner._machines, _MACHINE),
        ):
            stages = fields.child(key)
            for stage in stages.mapping_of():
                if stage not in priors:
                    raise stages.fail(stage, f"must be one of {', '.join(priors)}")
                each = stages.child(stage)
                for name in _bounded(each):
                    effects[stage, name] = _restored(each, name, priors[stage])
        stages = fields.child("noise")
        for stage in stages.mapping_of():
            each = stages.child(stage)
            for name in _bounded(each):
                learner._noise[stage, name] = Noise.from_json(each, name)
        fields.done()
        return learner

    def _measure(self, stage: str, name: str, machine: str, residual: float) -> None:
        limit = math.log(MOST_STEP)
        residual = max(-limit, min(limit, residual))
        own = self._profiles.get((stage, name))
        if own is None:
            own = self._profiles[stage, name] = Belief(*_PROFILE[stage])
        effects = [own]
        # sending as it is copies and doesn't code: it teaches nothing of codecs
        if name != NONE:
            effects.append(self._shared[stage])
            if stage in _MACHINE:
                effects.append(self._machine(stage, machine))
        key = (stage, machine if name != NONE else f"{machine} {NONE}")
        noise = self._noise.pop(key, None) or Noise()
        self._noise[key] = noise
        if len(self._noise) > 4 * MAX_MACHINES:
            del self._noise[next(iter(self._noise))]
        if measure(effects, noise, residual):
            self.changes[stage] += 1

    def _machine(self, stage: str, machine: str) -> Belief:
        effect = self._machines.pop((stage, machine), None) or Belief(*_MACHINE[stage])
        # the most recently seen stands last
        self._machines[stage, machine] = effect
        if len(self._machines) > 2 * MAX_MACHINES:
            del self._machines[next(iter(self._machines))]
        return effect

    def _usual_machine(self, stage: str) -> tuple[float, float]:
        """Return mean and variance of the machines' effect, each weighing by what is known of it."""
        prior = _MACHINE[stage][0] ** 2
        total = weight = 0.0
        for (of, _), effect in self._machines.items():
            if of == stage:
                known = max(0.0, prior - effect.variance)
                total += known * effect.mean
                weight += known
        if weight <= 0:
            return 0.0, prior
        # a machine of which all is known makes the usual one as certain as itself
        return total / weight, max(0.0, prior - weight)

    def _correction(self, name: str, machine: Mapping[str, tuple[float, float]]) -> Correction:
        factors: dict[str, float] = {}
        doubts: dict[str, float] = {}
        for stage in STAGES:
            own = self._profiles.get((stage, name)) or Belief(*_PROFILE[stage])
            mean, variance = own.mean, own.variance
            if name != NONE:
                shared = self._shared[stage]
                usual, unsure = machine.get(stage, (0.0, 0.0))
                mean += shared.mean + usual
                variance += shared.variance + unsure
            factors[stage] = max(1 / MOST, min(MOST, math.exp(mean)))
            doubts[stage] = min(MAX_DOUBT, math.sqrt(variance))
        return Correction(**factors, doubt=Doubt(**doubts))


def distance(old: Mapping[str, Correction], new: Mapping[str, Correction]) -> float:
    """Return the largest relative change of any correction, or change of its doubt: 0.1 for 10 % more or less."""
    most = 0.0
    for name in old.keys() | new.keys():
        before, after = old.get(name, UNCORRECTED), new.get(name, UNCORRECTED)
        for stage in STAGES:
            change = math.log(getattr(after, stage) / getattr(before, stage))
            doubt = getattr(after.doubt, stage) - getattr(before.doubt, stage)
            most = max(most, abs(change), abs(doubt))
    return math.expm1(most)


def _nested(values: Mapping[tuple[str, str], Belief | Noise]) -> dict[str, dict[str, list[float]]]:
    nested: dict[str, dict[str, list[float]]] = {}
    for (stage, name), value in values.items():
        nested.setdefault(stage, {})[name] = value.to_json()
    return nested


def _restored(fields: Fields, key: str, prior: tuple[float, float]) -> Belief:
    mean, variance = numbers(fields, key, 2)
    if not (abs(mean) <= math.log(MOST_STEP) and 0 <= variance <= MAX_DOUBT**2):
        raise fields.fail(key, f"must be a belief, got {mean}, {variance}")
    return Belief(*prior, mean=mean, variance=variance)


def _bounded(fields: Fields) -> list[str]:
    names = list(fields.mapping_of())
    if len(names) > 4 * MAX_MACHINES:
        raise fields.fail(names[0], f"is one of {len(names)}, more than {4 * MAX_MACHINES}")
    return names
