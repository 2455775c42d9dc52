"""``quantise.fp8.v1``: the nearest e4m3 number."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.fields import Fields
from kvserve_kernels import fp8
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, require_finite, store


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8(Stage):
    """Round to e4m3fn, each token's head scaled so that its greatest magnitude becomes 448.

    The section holds the greatest magnitudes ``[layers, tokens, kv_heads]`` in the input's dtype. The levels are the
    bytes of the e4m3 numbers; the two that mean NaN do not occur.
    """

    id: ClassVar[str] = "quantise.fp8.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "e4m3 floats, scaled per token and head"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give 256 LEVELS."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.LEVELS, levels=256)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the scales."""
        return spec.count // spec.head_dim * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Quantise."""
        codes, peaks = fp8.encode(load(value).reshape(-1, spec.head_dim), scaled=True)
        section = (peaks.astype(spec.array_dtype, copy=False),)
        return Encoded(section, codes.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels' values."""
        assert value is not None
        rows = spec.count // spec.head_dim
        (peaks,) = cut(section, self.id, (rows,), dtype=spec.array_dtype)
        require_finite(peaks, spec, self.id)
        codes: Array = value.reshape(-1, spec.head_dim)
        out = fp8.decode(np.asarray(codes), load(peaks), scaled=True)
        return store(out, spec.array_dtype).reshape(spec.shape)
