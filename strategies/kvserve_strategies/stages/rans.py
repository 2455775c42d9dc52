"""``code.rans.v1``: levels by interleaved rANS with static tables made from the piece itself."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_strategies.entropy import coded_nbytes, decode_integers, encode_integers
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Rans(Stage):
    """Code levels at close to their entropy; see `kvserve_strategies.entropy` for the bytes.

    Attributes:
        tables: Most probability tables to send, 1 to 16; channels of like spread share one.
    """

    tables: int

    id: ClassVar[str] = "code.rans.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "levels by rANS with tables of this piece"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``tables``."""
        return cls(tables=params.integer("tables", minimum=1, maximum=16))

    def resolve(self, spec: Spec) -> Spec:
        """Take LEVELS."""
        take_form(self, spec, Form.LEVELS)
        return replace(spec, form=Form.CODED, levels=None)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the plain levels and a head."""
        return coded_nbytes(spec.count, spec.array_dtype.itemsize)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Code the levels."""
        flat = value.reshape(spec.layers, spec.tokens, spec.columns)
        return Encoded(encode_integers(flat, max_tables=self.tables), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels."""
        levels = decode_integers(
            section, shape=(spec.layers, spec.tokens, spec.columns), dtype=spec.array_dtype
        )
        if spec.levels is not None and levels.max() >= spec.levels:
            raise WireError(WireReason.MALFORMED, f"{self.id}: a level is not below {spec.levels}")
        return levels.reshape(spec.shape)
