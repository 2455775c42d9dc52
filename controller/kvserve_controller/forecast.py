"""How far transfers are from what pods predict of them, and what that leaves of a deadline.

A percentile of a latency is kept by predicting that percentile, not the mean: predicted times are log-normal about a
bias, with the scatter that was seen and with the doubt about a profile's own corrections.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Self

from kvserve_api.fields import Fields
from kvserve_api.latency import Link, predict
from kvserve_api.policy import Objective
from kvserve_api.table import Candidate
from kvserve_controller.belief import numbers

PRIOR_SD: Final = 0.15
PRIOR_WEIGHT: Final = 8.0
"""Before any transfer was seen: predictions scatter by 15 %, as sure as after eight transfers."""
FORGETTING: Final = 0.98
CLIP: Final = 2.5
"""A transfer farther from its prediction than so many standard deviations counts as so far (Huber 1981): one that met a
link's drop would make all others look late, and no margin of theirs would have helped it."""
MOST_RESIDUAL: Final = math.log(10.0)
MOST_MARGIN: Final = 4.0
"""A larger margin would say that nothing is known: the deadline then rules by what is believed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the logarithm of observed over predicted time: its mean and standard deviation."""

    bias: float = 0.0
    sd: float = PRIOR_SD


PRIOR_SPREAD: Final = Spread()


class Forecast:
    """What is known of the predictions of one policy's pods."""

    def __init__(self) -> None:
        self._weight = PRIOR_WEIGHT
        self._sum = 0.0
        self._squares = PRIOR_WEIGHT * PRIOR_SD**2

    def add(self, observed_s: float, predicted_s: float) -> None:
        """Compare a transfer with its prediction; nothing is learned where there was none."""
        if not (predicted_s > 0 and observed_s > 0):
            return
        residual = math.log(observed_s / predicted_s)
        known = self.spread
        most = min(MOST_RESIDUAL, CLIP * max(known.sd, PRIOR_SD))
        residual = max(known.bias - most, min(known.bias + most, residual))
        self._weight = self._weight * FORGETTING + 1
        self._sum = self._sum * FORGETTING + residual
        self._squares = self._squares * FORGETTING + residual**2

    def to_json(self) -> list[float]:
        """Return all that was learned, for a checkpoint."""
        return [round(value, 6) for value in (self._weight, self._sum, self._squares)]

    @classmethod
    def from_json(cls, fields: Fields, key: str) -> Self:
        """Read what `to_json` returned.

        Raises:
            SpecError: It is damaged.
        """
        forecast = cls()
        weight, total, squares = numbers(fields, key, 3)
        if not (weight > 0 and squares >= 0):
            raise fields.fail(key, "must be a positive weight, a sum and a sum of squares")
        forecast._weight, forecast._sum, forecast._squares = weight, total, squares
        return forecast

    @property
    def spread(self) -> Spread:
        """What is known now."""
        bias = self._sum / self._weight
        return Spread(bias, math.sqrt(max(0.0, self._squares / self._weight - bias**2)))


def margin(
    candidate: Candidate,
    objectives: Iterable[Objective],
    thresholds_s: Iterable[float],
    *,
    leeways: Iterable[float],
    spread: Spread,
    native_bytes: float,
    link: Link,
) -> float:
    """Return what a candidate's predicted time is multiplied with, to compare it with the shortest threshold.

    Args:
        candidate: Whose time.
        objectives: What is asked, each at its percentile.
        thresholds_s: What each objective leaves a transfer, in seconds, in the same order.
        leeways: By how much each percentile may be lower, because fewer are late than predicted; see `Leeway`.
        spread: Of the predictions.
        native_bytes: Of a usual transfer: which of its stages the doubt falls on.
        link: A usual link.

    Returns:
        1 to ``MOST_MARGIN``; 1 without objectives.
    """
    usual = predict(
        native_bytes=native_bytes,
        ratio=candidate.ratio,
        encode=candidate.encode,
        decode=candidate.decode,
        link=link,
    )
    stages = (
        (usual.encode_s, candidate.doubt.encode),
        (usual.wire_s, candidate.doubt.wire),
        (usual.decode_s, candidate.doubt.decode),
    )
    doubt = math.hypot(*(time_s / usual.total_s * unsure for time_s, unsure in stages))
    sd = math.hypot(spread.sd, doubt)
    left_s = most_s = math.inf
    for objective, threshold_s, leeway in zip(objectives, thresholds_s, leeways, strict=True):
        quantile = NormalDist().inv_cdf(objective.percentile / 100 - leeway)
        factor = min(MOST_MARGIN, math.exp(max(0.0, spread.bias + quantile * sd)))
        left_s = min(left_s, threshold_s / factor)
        most_s = min(most_s, threshold_s)
    return 1.0 if most_s == math.inf else max(1.0, most_s / left_s)
