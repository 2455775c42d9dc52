"""``transform.scale.v1``: each token's head at the same size."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import ValuesError
from kvserve_api.fields import Fields
from kvserve_kernels import scale
from kvserve_strategies.entropy import coded_nbytes, decode_integers, encode_integers
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import load, store


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Scale(Stage):
    """Divide each token's head by about its root mean square, so that one step suits large and small tokens.

    Values of tokens differ in size by far more than their errors may: those that attention rests on are the smallest.
    The divisor is a power of the square root of two, ``sqrt(2 ** (e - 127))``; the section holds the e, ``[layers,
    tokens, kv_heads]``, as `kvserve_strategies.entropy` codes uint8 with one table.
    """

    id: ClassVar[str] = "transform.scale.v1"
    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "each token's head divided by about its size"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give REAL ones."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.REAL)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of plain exponents."""
        return coded_nbytes(spec.count // spec.head_dim, 1)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Divide."""
        made = scale.scale(load(value).reshape(-1, spec.head_dim))
        if made is None:
            raise ValuesError("the squares of a token's values exceed float32")
        scaled, exponents = made
        exponents = exponents.reshape(spec.layers, spec.tokens, spec.kv_heads)
        return Encoded(encode_integers(exponents, max_tables=1), scaled.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Multiply again."""
        assert value is not None
        exponents = decode_integers(
            section,
            shape=(spec.layers, spec.tokens, spec.kv_heads),
            dtype=np.dtype(np.uint8),
        )
        kernel_dtype = np.float32 if spec.array_dtype == np.float16 else spec.array_dtype
        out = scale.unscale(value.reshape(-1, spec.head_dim), exponents.reshape(-1), kernel_dtype)
        return store(out, spec.array_dtype).reshape(spec.shape)
