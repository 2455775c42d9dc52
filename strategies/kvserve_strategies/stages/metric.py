"""``transform.metric.v1``: values in the coordinates in which every error costs the same."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.linear import LinearStage, Real, bundle_of
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Form, Space, Spec, Where, take_form, take_space


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Metric(LinearStage):
    """Multiply each head by the square root of a calibrated metric.

    The metric M of a head says what an error e costs in the model's predictions, ``e' M e``; after multiplication by
    its square root the squared length of an error is its cost, so that one quantiser step suits all layers and heads.
    Which metrics there are, and how they are measured, is in ``docs/calibration.md``.

    Attributes:
        metric: Name of the metric in the bundle.
    """

    metric: str

    id: ClassVar[str] = "transform.metric.v1"
    summary: ClassVar[str] = "heads in the coordinates of a calibrated metric"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``metric``."""
        return cls(metric=params.string("metric", min_length=1, max_length=32))

    def resolve(self, spec: Spec) -> Spec:
        """Take centred REAL values, give REAL ones."""
        take_form(self, spec, Form.REAL)
        take_space(self, spec, Space.CENTRED)
        return replace(spec, space=self.metric)

    def apply(self, x: Real, spec: Spec) -> Real:
        """Go into the metric's coordinates."""
        return self._multiply(x, spec, 0)

    def invert(self, y: Real, spec: Spec) -> Real:
        """Go back."""
        return self._multiply(y, spec, 1)

    def _multiply(self, x: Real, spec: Spec, direction: int) -> Real:
        bundle, where = bundle_of(self, spec)
        roots = root_blocks(bundle, where, self.metric)[direction]
        # in float64, so that the order of summation, which differs between processors, does not show
        out: Real = np.einsum("lhij,lthj->lthi", roots.astype(np.float64), x, optimize=True).astype(
            np.float32
        )
        return out


def root_blocks(bundle: Bundle, where: Where, metric: str) -> tuple[Real, Real]:
    """Return the metric's square root and its inverse for each row and head of a piece.

    Returns:
        Two arrays ``[layers, kv_heads, head_dim, head_dim]`` float32.

    Raises:
        StrategyError: The bundle has no such metric.
    """
    if metric not in bundle.metrics:
        known = ", ".join(bundle.metrics) or "none"
        raise StrategyError("metric", f"{metric!r} is not in the bundle; it has: {known}")
    chosen = np.ix_(where.layers, where.heads)
    pairs = [bundle.metric(metric, kind) for kind in where.kinds]
    root, inverse = (np.concatenate([pair[side][chosen] for pair in pairs]) for side in (0, 1))
    return root, inverse
