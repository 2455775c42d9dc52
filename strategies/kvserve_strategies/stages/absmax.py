"""``quantise.absmax.v1``: levels symmetric about zero, up to the greatest magnitude of a token."""

from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_kernels import absmax
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, require_finite, store

_TOKEN: Final = "token"
_SCOPES: Final = (_TOKEN, "head")


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class AbsMax(Stage):
    """Spread levels evenly between plus and minus the greatest magnitude, zero in the middle.

    With scope ``token`` it is the quantiser of CacheGen (Liu et al., 2024) as LMCache 0.5.6 ships it: one scale for all
    heads and channels of a token in a layer, ``bins // 2 - 1`` levels either side of zero, and the same float32
    operations in the same order, so that levels and decoded values are equal to theirs. (The paper's CacheGen also
    codes differences between tokens; what LMCache ships does not.) With scope ``head`` it is the symmetric 8-bit cache
    of vLLM. The section holds the magnitudes ``[layers, tokens]`` or ``[layers, tokens, kv_heads]`` in the input's
    dtype.

    Attributes:
        bins: 4 to 256; of these one (two, if odd) is never used, because levels are symmetric.
        scope: ``token`` or ``head``: what shares one magnitude.
    """

    bins: int
    scope: str

    id: ClassVar[str] = "quantise.absmax.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "symmetric levels per token, or per token and head"

    def __post_init__(self) -> None:
        if self.scope not in _SCOPES:
            raise StrategyError("scope", f"must be one of {', '.join(_SCOPES)}, got {self.scope!r}")

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``bins`` and ``scope``."""
        return cls(
            bins=params.integer("bins", minimum=4, maximum=256),
            scope=params.string("scope", choices=_SCOPES),
        )

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give bounded LEVELS."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.LEVELS, levels=2 * (self.bins // 2 - 1) + 1)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the magnitudes."""
        return spec.count // self._row(spec) * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Quantise."""
        codes, peaks = absmax.encode(load(value).reshape(-1, self._row(spec)), self.bins)
        section = (peaks.astype(spec.array_dtype, copy=False),)
        return Encoded(section, codes.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels' values."""
        assert value is not None
        row = self._row(spec)
        (peaks,) = cut(section, self.id, (spec.count // row,), dtype=spec.array_dtype)
        require_finite(peaks, spec, self.id)
        out = absmax.decode(value.reshape(-1, row), load(peaks), self.bins)
        return store(out, spec.array_dtype).reshape(spec.shape)

    def _row(self, spec: Spec) -> int:
        """Return how many values share one magnitude."""
        return spec.columns if self.scope == _TOKEN else spec.head_dim
