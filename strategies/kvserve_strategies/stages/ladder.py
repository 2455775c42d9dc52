"""``code.ladder.v1``: levels by interleaved rANS with a fixed family of tables, one chosen for each channel."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels.transpose import transpose
from kvserve_strategies.ladder import coded_nbytes, decode_levels, encode_levels
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder(Stage):
    """Code levels that are zero-mean in each channel; see `kvserve_strategies.ladder` for the bytes.

    Unlike `Rans` it sends no tables and fits one to every single channel, so it suits the components of a transform,
    whose spread differs from channel to channel. Levels of a bounded number are taken from the middle one.
    """

    id: ClassVar[str] = "code.ladder.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "zero-mean levels by rANS with built-in tables"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Take no parameters."""
        del params
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take LEVELS."""
        take_form(self, spec, Form.LEVELS)
        return replace(spec, form=Form.CODED, levels=None)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the plain levels and a head."""
        return coded_nbytes(spec.count)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Code the levels."""
        flat = value.reshape(spec.layers, spec.tokens, spec.columns)
        by_channel = transpose(flat, np.int16).reshape(-1, spec.tokens)
        if spec.levels is not None:
            by_channel -= np.int16(spec.levels // 2)
        return Encoded(encode_levels(by_channel), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels."""
        by_channel = decode_levels(section, spec.layers * spec.columns, spec.tokens)
        if spec.levels is not None:
            by_channel = by_channel + np.int16(spec.levels // 2)
            if by_channel.min() < 0 or by_channel.max() >= spec.levels:
                raise WireError(
                    WireReason.MALFORMED, f"{self.id}: a level is not one of {spec.levels}"
                )
        shaped = by_channel.reshape(spec.layers, spec.columns, spec.tokens)
        return transpose(shaped, spec.array_dtype.type).reshape(spec.shape)
