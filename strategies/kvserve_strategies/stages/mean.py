"""``transform.mean.v1``: channels without their calibrated mean."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.fields import Fields
from kvserve_strategies.linear import LinearStage, Real, bundle_of
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Form, Space, Spec, take_form, take_space


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Mean(LinearStage):
    """Subtract from each channel the mean that calibration found.

    Most of the energy of keys is a constant of the channel, which softmax does not see. Unlike ``transform.centre.v1``
    it sends nothing, and a token's code does not depend on its neighbours.
    """

    id: ClassVar[str] = "transform.mean.v1"
    summary: ClassVar[str] = "channels without their calibrated mean"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take REAL values without rotation, give REAL ones."""
        take_form(self, spec, Form.REAL)
        take_space(self, spec, Space.UNROPED)
        return replace(spec, space=Space.CENTRED)

    def apply(self, x: Real, spec: Spec) -> Real:
        """Subtract."""
        return x - self._means(spec)

    def invert(self, y: Real, spec: Spec) -> Real:
        """Add."""
        return y + self._means(spec)

    def _means(self, spec: Spec) -> Real:
        """Return ``[layers, 1, kv_heads, head_dim]``."""
        bundle, where = bundle_of(self, spec)
        rows = [bundle.mean(kind)[np.ix_(where.layers, where.heads)] for kind in where.kinds]
        return np.concatenate(rows)[:, None]
