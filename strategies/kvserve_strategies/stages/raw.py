"""``code.raw.v1``: the values as they lie in memory."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvserve_api.fields import Fields
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Raw(Stage):
    """Send native values little-endian in the order ``[layers, tokens, kv_heads, head_dim]``; nothing is computed."""

    id: ClassVar[str] = "code.raw.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = True
    takes_bytes: ClassVar[bool] = True
    summary: ClassVar[str] = "native values as they are"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values."""
        take_form(self, spec, Form.NATIVE)
        return replace(spec, form=Form.CODED)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the native size."""
        return spec.count * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Hand out the memory itself."""
        return Encoded((value,), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return a view of the section."""
        return cut(section, self.id, spec.shape, dtype=spec.array_dtype)[0]
