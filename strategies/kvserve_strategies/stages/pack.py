"""``code.pack.v1``: levels in as few whole bits as their number needs."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels.pack import pack, packed_nbytes, unpack
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form


def _width(spec: Spec) -> int:
    """Return the bits a level takes."""
    assert spec.levels is not None
    return (spec.levels - 1).bit_length()


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Pack(Stage):
    """Put levels of fixed width after each other, least bit first; unused bits of the last byte are zero."""

    id: ClassVar[str] = "code.pack.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "levels at a fixed number of bits"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take LEVELS of which there are at most 256."""
        take_form(self, spec, Form.LEVELS)
        if spec.levels is None:
            raise StrategyError(
                self.id, "takes at most 256 levels, its predecessor gives any number: use code.rans"
            )
        return replace(spec, form=Form.CODED, levels=None)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size, which no value changes."""
        return packed_nbytes(spec.count, _width(spec))

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Pack the levels."""
        return Encoded((pack(value.reshape(-1), _width(spec)),), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Unpack the levels."""
        if section.size != self.encoded_nbytes(spec):
            raise WireError(
                WireReason.MALFORMED,
                f"{self.id} takes {self.encoded_nbytes(spec)} bytes, got {section.size}",
            )
        return unpack(section, spec.count, _width(spec)).reshape(spec.shape)
