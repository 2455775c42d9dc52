"""``transform.recentre.v1``: components without what their mean in this piece is away from calibration's."""

from dataclasses import dataclass
from typing import ClassVar, Self

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_strategies.ladder import coded_nbytes
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

ROW = 64
"""Components that share a table."""


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Recentre(Stage):
    """Send the mean of each component over the piece's tokens, and code what the tokens are away from it.

    An error that all tokens of a piece share adds up in attention, while errors that differ cancel. A component that
    the step silences has such an error where its mean is not that of the calibration text, and levels near zero have
    a smaller one. Means are few numbers: they are rounded to multiples of a fine step and cost a thousandth of the
    bytes.

    It stands between ``transform.pca.v1`` and the quantiser and is computed together with them: what is subtracted is
    the value of the rounded means, see `kvserve_strategies.recentring`. The section holds the levels of all components
    of all blocks as `kvserve_strategies.ladder` codes channels of 64 numbers, with zeros after the last.

    Attributes:
        step: The step of the means over the root mean square of all components of the basis, 0.02 to 16.
    """

    step: float

    id: ClassVar[str] = "transform.recentre.v1"
    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "components without their mean in the piece, which is sent"
    calibrated: ClassVar[bool] = True

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``step``."""
        return cls(step=params.number("step", minimum=0.02, maximum=16))

    def resolve(self, spec: Spec) -> Spec:
        """Take components, give components."""
        take_form(self, spec, Form.REAL)
        take_space(self, spec, Space.COMPONENTS)
        return spec

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of plain levels, one for each component."""
        return coded_nbytes(rows_of(spec.columns) * ROW)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages around it")

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages around it")


def rows_of(components: int) -> int:
    """Return how many rows of `ROW` numbers hold so many components."""
    return -(-components // ROW)
