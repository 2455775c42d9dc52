"""``transform.centre.v1``: each channel without its mean over the tokens."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvserve_api.errors import ValuesError
from kvserve_api.fields import Fields
from kvserve_kernels import step
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, require_finite, store


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Centre(Stage):
    """Subtract from each channel its mean over the tokens of this piece.

    Most of the energy of keys is a constant of the channel, which costs bits and says nothing. The section holds the
    means ``[layers, kv_heads * head_dim]``, rounded to the cache's dtype before they are subtracted.
    """

    id: ClassVar[str] = "transform.centre.v1"
    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "channels without their mean over the tokens"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values, give REAL ones."""
        take_form(self, spec, Form.NATIVE)
        return replace(spec, form=Form.REAL)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the means."""
        return spec.layers * spec.columns * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Subtract the means."""
        made = step.centre(load(value).reshape(spec.layers, spec.tokens, spec.columns))
        if made is None:
            raise ValuesError("a channel varies by more than float32 can hold")
        centred, means = made
        return Encoded((store(means, spec.array_dtype),), centred.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Add the means again."""
        assert value is not None
        (means,) = cut(section, self.id, (spec.layers, spec.columns), dtype=spec.array_dtype)
        require_finite(means, spec, self.id)
        flat = value.reshape(spec.layers, spec.tokens, spec.columns)
        return store(step.uncentre(flat, load(means)), spec.array_dtype).reshape(spec.shape)
