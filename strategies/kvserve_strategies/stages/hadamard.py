"""``transform.hadamard.v1``: each head turned so that no channel stands out."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ValuesError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels import hadamard
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
)
from kvserve_strategies.values import load, store


@lru_cache(maxsize=64)
def signs(seed: int, dim: int) -> NDArray[np.float32]:
    """Return ``[dim]`` numbers 1 or -1, all 1 for seed 0.

    They are the lowest bits of SplitMix64 (Steele, Lea and Flood, 2014) started at the seed, so that every machine and
    every version of every library draws the same.
    """
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    out = np.ones(dim, np.float32)
    for index in range(dim if seed else 0):
        word = (seed + (index + 1) * step) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        out[index] = -1 if (word ^ (word >> 31)) & 1 else 1
    return out


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Hadamard(Stage):
    """Multiply each token's head by an orthonormal Walsh-Hadamard matrix, after signs drawn for the channels.

    Outlying channels are spread over all of them, which suits quantisers of fixed length: QuaRot (Ashkboos et al.,
    2024) and TurboQuant (Zandieh et al., 2025). Before an entropy coder it does harm: the coder lives on the
    differences between channels that it takes away. A head whose size is no power of two is transformed in blocks of
    the largest one that divides it. Nothing is written.

    Attributes:
        seed: Of the signs, the same for all layers and heads; 0 for none.
    """

    seed: int

    id: ClassVar[str] = "transform.hadamard.v1"
    role: ClassVar[Role] = Role.TRANSFORM
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "heads turned so that channels are alike"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``seed``."""
        return cls(seed=params.integer("seed", minimum=0, maximum=2**32 - 1))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give REAL ones."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.REAL, space=Space.OTHER)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return 0."""
        return 0

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Turn the heads."""
        made = hadamard.hadamard(self._flip(load(value).reshape(-1, spec.head_dim)))
        if made is None:
            raise ValuesError("the sum of a token's values exceeds float32")
        return Encoded((), made.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Turn them back."""
        assert value is not None
        if section.size:
            raise WireError(WireReason.MALFORMED, f"{self.id} writes nothing, got {section.size}")
        kernel_dtype: Any = np.float32 if spec.array_dtype == np.float16 else spec.array_dtype
        out = hadamard.restore(value.reshape(-1, spec.head_dim), kernel_dtype)
        return store(self._flip(out), spec.array_dtype).reshape(spec.shape)

    def _flip(self, rows: Array) -> Array:
        """Multiply channels by their signs; exact, so it commutes with rounding."""
        if not self.seed:
            return rows
        chosen = signs(self.seed, rows.shape[1])
        if rows.dtype == np.uint16:
            flipped: Array = rows ^ np.where(chosen < 0, np.uint16(0x8000), np.uint16(0))
            return flipped
        product: Array = rows * chosen
        return product
