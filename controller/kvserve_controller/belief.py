"""What is believed of one multiplicative effect: a normal distribution of its logarithm that forgets.

Each effect is an Ornstein–Uhlenbeck process: left alone it returns to its prior, mean and variance, with a half-life.
A measurement is explained by the sum of several effects; the filter that divides it among them is Kalman's (1960) with
the covariances between effects left out, so that a transfer costs a few operations and not a matrix. What is left out
makes the variance of a sum that was measured too large rather than too small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.fields import Fields

HALF_LIFE_S: Final = 600.0
"""In so many seconds without transfers half of what was learned is forgotten."""
CLIP: Final = 2.5
"""A measurement farther from what is believed than so many standard deviations counts as so far (Huber 1981)."""
STREAK: Final = 3
"""So many such measurements in a row, all slower or all faster, are no outliers: something has changed."""
FIRST_NOISE: Final = 0.4
LEAST_NOISE: Final = 0.02
MOST_NOISE: Final = 0.8
NOISE_GAIN: Final = 0.03
"""Share of a measurement in the running estimate of the noise: about 30 transfers, fewer at first."""
NOISE_WEIGHT: Final = 5
"""How many measurements the first estimate counts for."""


@dataclass(slots=True)
class Belief:
    """One effect.

    Attributes:
        prior_sd: Standard deviation of the logarithm before anything was measured; its mean is 0.
        agility: Share of the noise's variance that each measurement adds to the belief's, so that it goes on learning:
            its memory is about ``1 / sqrt(agility)`` transfers.
        mean: Of the logarithm.
        variance: Of the logarithm.
    """

    prior_sd: float
    agility: float
    mean: float = 0.0
    variance: float = -1.0

    def __post_init__(self) -> None:
        if self.variance < 0:
            self.variance = self.prior_sd**2

    def fade(self, share: float) -> None:
        """Return to the prior, but for a share."""
        prior = self.prior_sd**2
        self.mean *= share
        self.variance = prior - share**2 * (prior - self.variance)

    def doubt_again(self) -> None:
        """Believe nothing firmly any more."""
        self.variance = max(self.variance, self.prior_sd**2)

    def to_json(self) -> list[float]:
        """Return mean and variance."""
        return [round(self.mean, 6), round(self.variance, 8)]


@dataclass(slots=True)
class Noise:
    """How much measurements of one stage scatter, and whether they have left what is believed.

    Attributes:
        variance: Of the logarithm of a single measurement.
        count: Measurements so far.
        streak: Measurements beyond the clip in a row; negative for those below.
    """

    variance: float = FIRST_NOISE**2
    count: int = 0
    streak: int = 0

    def to_json(self) -> list[float]:
        """Return variance and count."""
        return [round(self.variance, 8), self.count]

    @classmethod
    def from_json(cls, fields: Fields, key: str) -> Self:
        """Read variance and count."""
        variance, count = numbers(fields, key, 2)
        return cls(
            variance=min(max(variance, LEAST_NOISE**2), MOST_NOISE**2), count=max(0, int(count))
        )


def measure(effects: Sequence[Belief], noise: Noise, value: float) -> bool:
    """Learn from one measurement of a sum of effects.

    Args:
        effects: Whose sum was measured; changed in place.
        noise: Of such measurements; changed in place.
        value: The logarithm of observed over profiled.

    Returns:
        Whether it was the last of a streak: the effects were found to have changed, and are doubted again.
    """
    error = value - sum(effect.mean for effect in effects)
    for effect in effects:
        grown = effect.variance + effect.agility * noise.variance
        effect.variance = min(grown, max(effect.variance, effect.prior_sd**2))
    spread = sum(effect.variance for effect in effects) + noise.variance
    limit = CLIP * math.sqrt(spread)
    changed = False
    if abs(error) <= limit:
        noise.streak = 0
    else:
        sign = 1 if error > 0 else -1
        noise.streak = noise.streak + sign if noise.streak * sign > 0 else sign
        changed = abs(noise.streak) >= STREAK
        if changed:
            noise.streak = 0
            for effect in effects:
                effect.doubt_again()
            spread = sum(effect.variance for effect in effects) + noise.variance
            limit = CLIP * math.sqrt(spread)
        error = min(max(error, -limit), limit)
    if not changed:
        noise.count += 1
        weight = max(NOISE_GAIN, 1 / (NOISE_WEIGHT + noise.count))
        scatter = noise.variance + weight * (error * error - spread)
        noise.variance = min(max(scatter, LEAST_NOISE**2), MOST_NOISE**2)
    for effect in effects:
        gain = effect.variance / spread
        effect.mean += gain * error
        effect.variance *= 1 - gain
    return changed


def numbers(fields: Fields, key: str, count: int) -> list[float]:
    """Return a list of so many finite numbers below a key.

    Raises:
        SpecError: It is anything else.
    """
    values = fields.items(key, max_items=count)
    if len(values) != count or not all(_is_number(value) for value in values):
        raise fields.fail(key, f"must be a list of {count} finite numbers")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
