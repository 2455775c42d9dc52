"""``code.escape.v1``: native values without loss, sixteen exponents in 4 bits each and the rest in a list."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_kernels import escape, floats, pack
from kvserve_strategies.registry import register
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage, take_form

_WORDS: Final[dict[str, Any]] = {
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float32": np.uint32,
}
_PLAIN: Final = 0
_ESCAPED: Final = 1
_HEAD: Final = 24
# a position and a byte
_ESCAPE_NBYTES: Final = 3


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class EscapeCode(Stage):
    """Code the exponents of most values in 4 bits, with no entropy coder to wait for.

    The idea is that of SplitZip (Guo and Joshi, 2026): exponents are so alike that sixteen of them cover nearly all
    values of a cache, and a fixed length lets thousands of GPU lanes work apart. Signs and mantissas go as they are, so
    a bfloat16 value takes 12 bits and an escape 24 more; every bit pattern comes back. The section holds

    ================  =============================================================================================
    part              content
    ================  =============================================================================================
    head              mode u32 (0 plain, 1 escaped), escapes u32, the 16 exponents that have a code, u8, rising
    plain values      mode 0 only, all else of the head 0, and nothing follows: the native values
    counts            u32 for each 65,536 values: escapes among them
    codes             4 bits each, low half first
    rest              ``sign << mantissa bits | mantissa`` of each value: its low bytes, value after value (1 byte;
                      float32 3 bytes), and for float16 its top 3 bits, packed
    positions         u16 for each escape: where in its 65,536 values it is, rising
    exponents         u8 for each escape
    ================  =============================================================================================

    Plain is taken where it is smaller.
    """

    id: ClassVar[str] = "code.escape.v1"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = True
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "native values, exponents in 4 bits with escapes"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters; it has none."""
        return cls()

    def resolve(self, spec: Spec) -> Spec:
        """Take NATIVE values."""
        take_form(self, spec, Form.NATIVE)
        return replace(spec, form=Form.CODED)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the size of plain values and a head."""
        return _HEAD + spec.count * spec.array_dtype.itemsize

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Code the values."""
        words = value.reshape(-1).view(_WORDS[spec.dtype])
        exponents, rest = floats.split(words, floats.MANTISSA_BITS[spec.dtype])
        coded = escape.encode(exponents)
        head = np.zeros(2, np.uint32)
        if _fixed_nbytes(spec) + _ESCAPE_NBYTES * coded.values.size > self.encoded_nbytes(spec):
            return Encoded((head, np.zeros(escape.CODES, np.uint8), value), None)
        head[:] = _ESCAPED, coded.values.size
        section: tuple[Array, ...] = (
            head,
            coded.book,
            coded.counts,
            coded.codes,
            *_split_rest(rest, spec),
            coded.positions,
            coded.values,
        )
        return Encoded(section, None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the values."""
        if section.size < _HEAD:
            raise _malformed(f"{section.size} bytes can't hold a head")
        mode, escapes = section[:8].view(np.uint32).tolist()
        body = section[_HEAD:]
        if mode == _PLAIN:
            if section[4:_HEAD].any() or section.size != self.encoded_nbytes(spec):
                raise _malformed("plain values of another length, or a head that is not plain")
            return body.view(spec.array_dtype).reshape(spec.shape)
        if mode != _ESCAPED or section.size != _fixed_nbytes(spec) + _ESCAPE_NBYTES * escapes:
            raise _malformed(f"mode {mode}, {escapes} escapes, {section.size} bytes")
        sizes = (4 * _chunks(spec), -(-spec.count // 2), _rest_nbytes(spec), 2 * escapes)
        counts, codes, rest, positions, exponents = np.split(body, np.cumsum(sizes))
        coded = escape.Escaped(
            book=section[8:_HEAD],
            codes=codes,
            counts=counts.view(np.uint32),
            # the parts before are of any length, so 16-bit numbers may lie at odd addresses
            positions=positions.copy().view(np.uint16),
            values=exponents,
        )
        if int(coded.counts.sum(dtype=np.uint64)) != escapes:
            raise _malformed("the counts of escapes do not add up")
        bytes_of_exponents = escape.decode(coded, spec.count)
        if bytes_of_exponents is None:
            raise _malformed("positions of escapes do not rise, or lie outside")
        if spec.dtype == "float16" and bytes_of_exponents.max() > 31:
            raise _malformed("an exponent of float16 is over 31")
        words = floats.join(
            bytes_of_exponents,
            _join_rest(rest, spec),
            floats.MANTISSA_BITS[spec.dtype],
            _WORDS[spec.dtype],
        )
        return words.view(spec.array_dtype).reshape(spec.shape)


def _chunks(spec: Spec) -> int:
    return -(-spec.count // escape.CHUNK)


def _rest_nbytes(spec: Spec) -> int:
    """Return the bytes of all signs and mantissas: 8 bits a value for bfloat16, 11 and 24 for the others."""
    whole = {"bfloat16": 1, "float16": 1, "float32": 3}[spec.dtype] * spec.count
    return whole + (pack.packed_nbytes(spec.count, 3) if spec.dtype == "float16" else 0)


def _fixed_nbytes(spec: Spec) -> int:
    """Return the bytes of a section without escapes."""
    return _HEAD + 4 * _chunks(spec) + -(-spec.count // 2) + _rest_nbytes(spec)


def _split_rest(rest: Array, spec: Spec) -> tuple[Array, ...]:
    """Return signs and mantissas as they are sent."""
    match spec.dtype:
        case "bfloat16":
            return (rest,)
        case "float16":
            return rest.astype(np.uint8), pack.pack((rest >> 8).astype(np.uint8), 3)
        case _:
            return (np.ascontiguousarray(rest.view(np.uint8).reshape(-1, 4)[:, :3]),)


def _join_rest(data: Bytes, spec: Spec) -> Array:
    """Undo `_split_rest`."""
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


def _malformed(detail: str) -> WireError:
    return WireError(WireReason.MALFORMED, f"{EscapeCode.id}: {detail}")
