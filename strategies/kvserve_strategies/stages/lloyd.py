"""``quantise.lloyd.v1``: the levels that suit a normal distribution best."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError, ValuesError
from kvserve_api.fields import Fields
from kvserve_kernels import lloyd
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, require_finite, store

CENTROIDS: Final[dict[int, tuple[float, ...]]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (
        0.128395030, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571,
    ),
}  # fmt: skip
"""The positive half of the levels for each number of bits.

The fixed points of Lloyd's iteration (Lloyd, 1957/1982; Max, 1960) on the standard normal distribution: each level is
the mean of the values that are nearer to it than to any other.
"""
_SCALE_TYPES: Final = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_LARGEST_HALF: Final = 65_504


def centroids(bits: int) -> NDArray[np.float32]:
    """Return the ``2 ** bits`` levels, rising."""
    half = CENTROIDS[bits]
    return np.array([-c for c in reversed(half)] + list(half), np.float32)


def thresholds(bits: int) -> NDArray[np.float32]:
    """Return the ``2 ** bits - 1`` numbers midway between the levels, rising."""
    levels = centroids(bits).astype(np.float64)
    return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class LloydMax(Stage):
    """Divide each token's head by its root mean square and take the nearest level of a quantiser for normal values.

    After a rotation all channels of a head are about normal, so one set of levels serves all: TurboQuant (Zandieh et
    al., 2025), without the residual sketch, which peers found to hurt attention. Without a rotation outliers are
    clipped hard. The section holds the root mean squares ``[layers, tokens, kv_heads]`` in the cache's dtype; levels
    are chosen with them as they are sent.

    Attributes:
        bits: 1 to 4.
    """

    bits: int

    id: ClassVar[str] = "quantise.lloyd.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "Lloyd-Max levels of a normal distribution per token and head"

    def __post_init__(self) -> None:
        if self.bits not in CENTROIDS:
            raise StrategyError("bits", f"must be 1 to {max(CENTROIDS)}, got {self.bits}")

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``bits``."""
        return cls(bits=params.integer("bits", minimum=1, maximum=max(CENTROIDS)))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give ``2 ** bits`` LEVELS."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.LEVELS, levels=1 << self.bits)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the root mean squares."""
        return spec.count // spec.head_dim * np.dtype(_SCALE_TYPES[spec.dtype]).itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Quantise."""
        rows = load(value).reshape(-1, spec.head_dim)
        scales = lloyd.root_mean_squares(rows, _kernel_type(spec))
        if scales is None or (spec.dtype == "float16" and scales.max() > _LARGEST_HALF):
            raise ValuesError(f"a token's root mean square exceeds {spec.dtype}")
        sent = scales.astype(_SCALE_TYPES[spec.dtype], copy=False)
        codes = lloyd.encode(rows, load(sent), thresholds(self.bits))
        return Encoded((sent,), codes.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels' values."""
        assert value is not None
        dtype = np.dtype(_SCALE_TYPES[spec.dtype])
        (scales,) = cut(section, self.id, (spec.count // spec.head_dim,), dtype=dtype)
        require_finite(scales, replace(spec, form=Form.NATIVE), self.id)
        kernel_dtype = np.float32 if spec.array_dtype == np.float16 else spec.array_dtype
        out = lloyd.decode(
            value.reshape(-1, spec.head_dim), load(scales), centroids(self.bits), kernel_dtype
        )
        return store(out, spec.array_dtype).reshape(spec.shape)


def _kernel_type(spec: Spec) -> Any:
    return np.uint16 if spec.dtype == "bfloat16" else np.float32
