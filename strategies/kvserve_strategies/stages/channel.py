"""``quantise.channel.v1``: min-max levels for groups of successive tokens within one channel."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import ValuesError
from kvserve_api.fields import Fields
from kvserve_kernels import minmax
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form
from kvserve_strategies.values import cut, load, require_finite, store


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelMinMax(Stage):
    """Spread levels evenly from the least to the greatest value of each group of tokens of a channel.

    Keys have channels of very different size that hardly change from token to token: what KIVI (Liu et al., 2024)
    found. The section holds all least values ``[layers, groups, kv_heads * head_dim]``, then all greatest, in the
    input's dtype.

    Attributes:
        levels: Number of levels, 2 to 256.
        group: Tokens a group, 0 for all; the last group may be shorter.
    """

    levels: int
    group: int

    id: ClassVar[str] = "quantise.channel.v1"
    role: ClassVar[Role] = Role.QUANTISE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = True
    summary: ClassVar[str] = "min-max levels per channel and group of tokens"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``levels`` and ``group``."""
        return cls(
            levels=params.integer("levels", minimum=2, maximum=256),
            group=params.integer("group", minimum=0, maximum=1_048_576),
        )

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE or REAL values, give bounded LEVELS."""
        take_form(self, spec, Form.NATIVE, Form.REAL)
        return replace(spec, form=Form.LEVELS, levels=self.levels)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of the extremes."""
        return 2 * int(np.prod(self._extremes(spec))) * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Quantise."""
        made = minmax.encode_columns(
            load(value).reshape(spec.layers, spec.tokens, spec.columns),
            group=self._group(spec),
            levels=self.levels,
        )
        if made is None:
            raise ValuesError("a group of values spans more than float32 can hold")
        codes, least, greatest = made
        dtype = spec.array_dtype
        section = (least.astype(dtype, copy=False), greatest.astype(dtype, copy=False))
        return Encoded(section, codes.reshape(spec.shape))

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the levels' values."""
        assert value is not None
        shape = self._extremes(spec)
        least, greatest = cut(section, self.id, shape, shape, dtype=spec.array_dtype)
        require_finite(section.view(spec.array_dtype), spec, self.id)
        out = minmax.decode_columns(
            value.reshape(spec.layers, spec.tokens, spec.columns),
            load(least),
            load(greatest),
            group=self._group(spec),
            levels=self.levels,
        )
        return store(out, spec.array_dtype).reshape(spec.shape)

    def _group(self, spec: Spec) -> int:
        return min(self.group or spec.tokens, spec.tokens)

    def _extremes(self, spec: Spec) -> tuple[int, int, int]:
        """Return the shape of the least values: layers, groups and channels."""
        return spec.layers, -(-spec.tokens // self._group(spec)), spec.columns
