"""``transform.lead.v1``: the first tokens of a piece apart, exactly."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.fields import Fields
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, require_finite


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Lead(Stage):
    """Send the first tokens as they are and hand on the rest.

    The first tokens of a request draw much of all attention whatever they say ("attention sinks": Xiao et al., 2023),
    so an error in them costs more than in all others. A piece that does not start a request pays a little for nothing.
    It counts as lossy because, like what follows it, it carries no NaN and no infinity. The section holds the tokens'
    native values ``[layers, tokens, kv_heads, head_dim]``.

    Attributes:
        tokens: How many tokens, 1 to 64; of a shorter piece all but the last.
    """

    tokens: int

    id: ClassVar[str] = "transform.lead.v1"
    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "first tokens exactly, the rest handed on"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``tokens``."""
        return cls(tokens=params.integer("tokens", minimum=1, maximum=64))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values, give fewer of them."""
        take_form(self, spec, Form.NATIVE)
        taken, where = self._taken(spec), spec.where
        if where is not None:
            where = replace(where, first_token=where.first_token + taken)
        return replace(spec, tokens=spec.tokens - taken, where=where)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the native size of the first tokens."""
        return spec.layers * self._taken(spec) * spec.columns * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Split off the first tokens."""
        first, rest = np.split(value, [self._taken(spec)], axis=1)
        return Encoded((np.ascontiguousarray(first),), np.ascontiguousarray(rest))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Put the first tokens before the rest."""
        assert value is not None
        shape = (spec.layers, self._taken(spec), spec.kv_heads, spec.head_dim)
        (first,) = cut(section, self.id, shape, dtype=spec.array_dtype)
        require_finite(first, spec, self.id)
        return np.concatenate([first, value], axis=1)

    def _taken(self, spec: Spec) -> int:
        return min(self.tokens, spec.tokens - 1)
