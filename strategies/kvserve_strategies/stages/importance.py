"""``quantise.importance.v1``: calibrated components with a step that follows each token's importance."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_strategies.entropy import coded_nbytes
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


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Importance(Stage):
    """Round components like ``quantise.grid.v1``, tokens that matter more with a finer step.

    What an error in a token costs differs by orders of magnitude: most tokens are hardly looked at again, a few are
    all the time, and those near the end are looked at by what is generated next. The encoder predicts it from the
    token's components and its distance to the end of the request, with weights from calibration, and gives each token
    a class in each block of layers and heads; the step of class k is ``step / 2 ** (k / 2)``. With the squared step
    inverse to the cost all tokens are equally worth their bits (reverse water-filling). The decoder needs the classes
    only. Tokens of a class are coded together, so the coder must be ``code.ladder.v1``.

    The section holds the classes ``[blocks, tokens]``, least class 0, as `kvserve_strategies.entropy` codes uint8.

    Attributes:
        step: The step of a token of average importance, see `Grid`.
        dead_zone: See `Grid`.
    """

    step: float
    dead_zone: float

    id: ClassVar[str] = "quantise.importance.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "calibrated components, finer where tokens matter more"
    calibrated: ClassVar[bool] = True

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``step`` and ``dead_zone``."""
        return cls(
            step=params.number("step", minimum=0.02, maximum=16),
            dead_zone=params.number("dead_zone", minimum=0, maximum=2),
        )

    def resolve(self, spec: Spec) -> Spec:
        """Take components, give unbounded LEVELS of all that may be live."""
        take_form(self, spec, Form.REAL)
        take_space(self, spec, Space.COMPONENTS)
        return replace(spec, form=Form.LEVELS, levels=None, space=Space.OTHER)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of plain classes, with a block for each layer and head."""
        return coded_nbytes(spec.tokens * most_blocks(spec), 1)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages around it")

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Refuse: it is part of a projection."""
        raise StrategyError(self.id, "is computed together with the stages around it")


def most_blocks(spec: Spec) -> int:
    """Return the most blocks a piece can have: one for each layer and head."""
    return 1 if spec.where is None else len(spec.where.layers) * len(spec.where.heads)
