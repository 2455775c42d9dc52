"""``quantise.grid.v1``: calibrated components as multiples of one step."""

from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_strategies.registry import register
from kvserve_strategies.stage import (
    Array,
    Bytes,
    Encoded,
    Form,
    Role,
    Space,
    Spec,
    Stage,
    take_form,
    take_space,
)

_LIVE: Final = 0.23
"""Components whose deviation is below this part of a step are left out: what their few levels gain is worth less than
their bits."""
_NEAREST: Final = 0.47
_BEND: Final = 0.0064
_LEAST_OFFSET: Final = 0.02


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(Stage):
    """Round every component to a multiple of one step, the same for all layers, heads, keys and values.

    With equal steps in coordinates where equal errors cost equally, an entropy coder spends the bits where the variance
    is, close to the best possible (reverse water-filling; entropy-coded scalar quantisation: Gish and Pierce, 1968).
    It follows ``transform.pca.v1`` and is computed together with the linear stages before it: see
    `kvserve_strategies.projection`, which also defines the arithmetic. Components that the step would all but silence
    are left out, on both sides by the same rule.

    Attributes:
        step: The step over the root mean square of all components of the basis, 0.02 to 16.
        dead_zone: How far thresholds move away from zero because the larger level costs more bits: 0 rounds to the
            nearest level, 1 weighs a bit by what it is worth at this step; at most 2.
    """

    step: float
    dead_zone: float

    id: ClassVar[str] = "quantise.grid.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "calibrated components by one constant step"
    calibrated: ClassVar[bool] = True

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``step`` and ``dead_zone``."""
        return cls(
            step=params.number("step", minimum=0.02, maximum=16),
            dead_zone=params.number("dead_zone", minimum=0, maximum=2),
        )

    def resolve(self, spec: Spec) -> Spec:
        """Take components, give unbounded LEVELS of those that are live."""
        take_form(self, spec, Form.REAL)
        take_space(self, spec, Space.COMPONENTS)
        return replace(spec, form=Form.LEVELS, levels=None, space=Space.OTHER)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return 0: the step is in the strategy, the unit in the bundle."""
        return 0

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages before it")

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages before it")


def live_components(sigma: NDArray[np.float32], step: float) -> int:
    """Return how many components are kept, of deviations that fall; at least one."""
    return max(1, int(np.count_nonzero(sigma.astype(np.float64) > _LIVE * step)))


def thresholds(
    sigma: NDArray[np.float32], step: float, dead_zone: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return for each component what is added before rounding down, and how far a level moves towards zero.

    The thresholds are a fit to rate-distortion optimised ones (a level is lowered if its bits, at the slope
    2 ln 2 · 1/12 of distortion over rate, outweigh the error) of components of language models. The shift is the
    mean of an exponential distribution within an interval (Sullivan, "Efficient scalar quantization of exponential
    and Laplacian random variables", 1996).

    Args:
        sigma: Deviations ``[components]``.
        step: The step, in the same unit.
        dead_zone: See `Grid`.

    Returns:
        Offsets in [0, 1) and shifts in [-1, 0], float32.
    """
    ratio = np.maximum(sigma.astype(np.float64) / step, 1e-6)
    nearest = 0.5 - dead_zone * (0.5 - _NEAREST)
    offset = np.clip(nearest - dead_zone * _BEND / ratio**3, _LEAST_OFFSET, 0.5)
    decay = ratio / np.sqrt(2)
    inside = decay - 1 / np.expm1(np.minimum(1 / decay, 700))
    shift = np.clip(inside - offset, -1, 0)
    return offset.astype(np.float32), shift.astype(np.float32)
