"""``code.exponent.v1``: native values without loss, their exponents by rANS."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels import floats, pack
from kvserve_strategies.entropy import coded_nbytes, decode_integers, encode_integers
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form

_WORDS: dict[str, Any] = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def _rest_nbytes(spec: Spec) -> int:
    """Return the bytes of all signs and mantissas: 8 bits a value for bfloat16, 11 and 24 for the others."""
    whole = {"bfloat16": 1, "float16": 1, "float32": 3}[spec.dtype] * spec.count
    return whole + (pack.packed_nbytes(spec.count, 3) if spec.dtype == "float16" else 0)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentCode(Stage):
    """Code the exponents at close to their entropy and send signs and mantissas, which are noise, as they are.

    The idea is that of DFloat11 (Zhang et al., 2025) for weights. Every bit pattern comes back, NaN, infinity and -0
    too. The section holds the length of the coded exponents (u64), these (see `kvserve_strategies.entropy`), zeros to a
    multiple of 8, then the rest of each value, ``sign << mantissa bits | mantissa``: its low bytes, plane after value
    (1 byte; float32 3 bytes), and for float16 its top 3 bits, packed.

    Attributes:
        tables: Most probability tables to send, 1 to 16.
    """

    tables: int

    id: ClassVar[str] = "code.exponent.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "native values, exponents by rANS"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read ``tables``."""
        return cls(tables=params.integer("tables", minimum=1, maximum=16))

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values."""
        take_form(self, spec, Form.NATIVE)
        return replace(spec, form=Form.CODED)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size with plain exponents."""
        return 8 + -(-coded_nbytes(spec.count, 1) // 8) * 8 + _rest_nbytes(spec)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Code the values."""
        words = value.reshape(-1).view(_WORDS[spec.dtype])
        exponents, rest = floats.split(words, floats.MANTISSA_BITS[spec.dtype])
        coded = encode_integers(
            exponents.reshape(spec.layers, spec.tokens, spec.columns), max_tables=self.tables
        )
        nbytes = sum(piece.nbytes for piece in coded)
        section = [np.array([nbytes], np.uint64), *coded, np.zeros(-nbytes % 8, np.uint8)]
        match spec.dtype:
            case "bfloat16":
                section.append(rest)
            case "float16":
                section.append(rest.astype(np.uint8))
                section.append(pack.pack((rest >> 8).astype(np.uint8), 3))
            case _:
                section.append(np.ascontiguousarray(rest.view(np.uint8).reshape(-1, 4)[:, :3]))
        return Encoded(tuple(section), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the values."""
        nbytes = int(section[:8].view(np.uint64)[0]) if section.size >= 8 else 0
        start = 8 + -(-nbytes // 8) * 8
        if section.size != start + _rest_nbytes(spec) or section[8 + nbytes : start].any():
            raise WireError(WireReason.MALFORMED, f"{self.id}: its lengths do not add up")
        exponents = decode_integers(
            section[8 : 8 + nbytes],
            shape=(spec.layers, spec.tokens, spec.columns),
            dtype=np.dtype(np.uint8),
        )
        rest = self._rest(section[start:], spec)
        words = floats.join(
            exponents.reshape(-1), rest, floats.MANTISSA_BITS[spec.dtype], _WORDS[spec.dtype]
        )
        return words.view(spec.array_dtype).reshape(spec.shape)

    def _rest(self, data: Bytes, spec: Spec) -> Array:
        """Return sign and mantissa of each value."""
        match spec.dtype:
            case "bfloat16":
                return data
            case "float16":
                top = pack.unpack(data[spec.count :], spec.count, 3).astype(np.uint16)
                return data[: spec.count] | top << 8
            case _:
                rest = np.zeros((spec.count, 4), np.uint8)
                rest[:, :3] = data.reshape(-1, 3)
                return rest.view(np.uint32).reshape(-1)
