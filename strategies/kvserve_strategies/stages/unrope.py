"""``transform.unrope.v1``: keys without their rotary position embedding."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.fields import Fields
from kvserve_api.strategy import Kind
from kvserve_kernels import rotate
from kvserve_strategies.bundle import Rope
from kvserve_strategies.linear import LinearStage, Real, bundle_of
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Form, Space, Spec, take_form, take_space


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Unrope(LinearStage):
    """Rotate each key back by its position, as RoPE (Su et al., 2021) rotated it forward.

    A channel of a rotated key swings with the position; without the rotation it has a mean and is correlated with other
    channels, which is what the stages after this one use. Values pass through, and so do the keys of layers without
    rotary embedding. Positions are in the blob's header, the rotation is in the bundle.
    """

    id: ClassVar[str] = "transform.unrope.v1"
    summary: ClassVar[str] = "keys without their rotary embedding"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values, give REAL ones."""
        take_form(self, spec, Form.NATIVE)
        take_space(self, spec, Space.NATIVE)
        return replace(spec, form=Form.REAL, space=Space.UNROPED)

    def apply(self, x: Real, spec: Spec) -> Real:
        """Rotate back."""
        out = x.copy()
        for row, rope in self._rotated(spec):
            cos, sin = _tables(rope, spec, undo=True)
            out[row] = rotate.unrotate(x[row : row + 1], cos, sin, rope.interleaved)[0]
        return out

    def invert(self, y: Real, spec: Spec) -> Real:
        """Rotate forward again."""
        out = y.copy()
        for row, rope in self._rotated(spec):
            cos, sin = _tables(rope, spec, undo=False)
            out[row] = rotate.rotate(y[row : row + 1], cos, sin, rope.interleaved, np.float32)[0]
        return out

    def _rotated(self, spec: Spec) -> Iterator[tuple[int, Rope]]:
        """Yield the rows of rotated keys with their rotation."""
        bundle, where = bundle_of(self, spec)
        if where.kinds[0] == Kind.KEYS:
            for row, layer in enumerate(where.layers):
                rope = bundle.rope_of(layer)
                if rope is not None:
                    yield row, rope


def rope_tables(rope: Rope, first: int, tokens: int, *, undo: bool) -> tuple[Real, Real]:
    """Return cosine and sine of successive positions, ``[tokens, rotary_dim / 2]`` float32 each.

    Args:
        rope: The rotation.
        first: Position of the first token.
        tokens: How many.
        undo: For rotating back; the attention factor, if there is one, then divides.
    """
    factor = rope.attention_factor
    return rotate.tables(rope.inv_freq, 1 / factor if undo else factor, first, tokens)


def _tables(rope: Rope, spec: Spec, *, undo: bool) -> tuple[Real, Real]:
    assert spec.where is not None
    return rope_tables(rope, spec.where.first_token, spec.tokens, undo=undo)
