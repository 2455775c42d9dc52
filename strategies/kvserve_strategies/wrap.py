"""Stages that need what the decoder will see, so that the rest of the chain runs inside them.

A predictor must predict from decoded values, or its errors add up from layer to layer. So it gets the quantiser and the
coder that follow it, has them code one layer after the other, and writes all of it into its own section; in the payload
the chain ends with it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_strategies.stage import Array, Bytes, Encoded, Form, Role, Spec, Stage


@dataclass(frozen=True, slots=True)
class Rest:
    """The stages after a wrapping one: a quantiser, if any, and a coder.

    What they write for a value is the length of each section (u64), then the sections, each followed by zeros to a
    multiple of 8, as in a whole payload.

    Attributes:
        stages: In the order of encoding.
    """

    stages: tuple[Stage, ...]

    def specs(self, spec: Spec) -> list[Spec]:
        """Return what each stage takes.

        Raises:
            StrategyError: One can't take what its predecessor gives.
        """
        taken = []
        for stage in self.stages:
            taken.append(spec)
            spec = stage.resolve(spec)
        return taken

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the most bytes that a value of a spec can take, a multiple of 8."""
        pairs = zip(self.stages, self.specs(spec), strict=True)
        return sum(8 + padded(stage.encoded_nbytes(taken)) for stage, taken in pairs)

    def encode(self, value: Array, spec: Spec) -> Bytes:
        """Return the bytes of a value."""
        pieces: list[Bytes] = []
        lengths = []
        flowing: Array | None = value
        for stage, taken in zip(self.stages, self.specs(spec), strict=True):
            assert flowing is not None
            encoded = stage.encode(flowing, taken)
            section = [piece.reshape(-1).view(np.uint8) for piece in encoded.section]
            size = sum(piece.size for piece in section)
            pieces += [*section, np.zeros(padded(size) - size, np.uint8)]
            lengths.append(size)
            flowing = encoded.value
        return np.concatenate([np.array(lengths, np.uint64).view(np.uint8), *pieces])

    def decode(self, data: Bytes, spec: Spec) -> Array:
        """Undo `encode`.

        Args:
            data: The bytes, aligned to 8; anything may be in them.
            spec: Of the value.

        Raises:
            WireError: They are not what `encode` writes.
        """
        specs = self.specs(spec)
        at = 8 * len(specs)
        if data.size < at:
            raise _malformed(f"{data.size} bytes can't hold {len(specs)} lengths")
        sections = []
        for size in data[:at].view(np.uint64).tolist():
            end = at + padded(size)
            if end > data.size or data[at + size : end].any():
                raise _malformed(f"a section of {size} bytes at {at} of {data.size}")
            sections.append(data[at : at + size])
            at = end
        if at != data.size:
            raise _malformed(f"{data.size - at} bytes too many")
        value: Array | None = None
        for stage, section, taken in reversed(list(zip(self.stages, sections, specs, strict=True))):
            if section.size > stage.encoded_nbytes(taken):
                raise _malformed(f"{section.size} bytes for {stage.id}")
            value = stage.decode(section, value, taken)
        assert value is not None
        return value


class Wrapping(Stage):
    """A stage that codes together with what follows it."""

    __slots__ = ()

    @abstractmethod
    def nbytes_with(self, spec: Spec, rest: Rest) -> int:
        """Return the most bytes of its section, the rest's included."""

    @abstractmethod
    def inner(self, spec: Spec) -> Spec:
        """Return the spec of what it has the rest code, again and again."""

    @abstractmethod
    def encode_with(self, value: Array, spec: Spec, rest: Rest) -> tuple[Array, ...]:
        """Return its section, the rest's included."""

    @abstractmethod
    def decode_with(self, section: Bytes, spec: Spec, rest: Rest) -> Array:
        """Undo `encode_with`; every byte may be hostile."""

    def encoded_nbytes(self, spec: Spec) -> int:
        """Refuse: what it writes depends on what follows."""
        raise TypeError(f"{self.id} codes only together with what follows it")

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Refuse."""
        raise TypeError(f"{self.id} codes only together with what follows it")

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Refuse."""
        raise TypeError(f"{self.id} codes only together with what follows it")


@dataclass(frozen=True, slots=True)
class Wrapped(Stage):
    """A wrapping stage and what follows it, as the one coder that they are together.

    Attributes:
        outer: The wrapping stage.
        rest: What follows it.
    """

    outer: Wrapping
    rest: Rest

    id: ClassVar[str] = "code.wrapped"
    role: ClassVar[Role] = Role.CODE
    lossless: ClassVar[bool] = False
    is_fixed_size: ClassVar[bool] = False
    summary: ClassVar[str] = "a stage and all that follow it"

    @classmethod
    def parse(cls, params: Fields) -> Self:
        """Refuse: it is made by `join`, never by name."""
        raise StrategyError("id", f"{cls.id} can't be named")

    def resolve(self, spec: Spec) -> Spec:
        """Take what the wrapping stage takes."""
        self.outer.resolve(spec)
        self.rest.specs(self.outer.inner(spec))
        return replace(spec, form=Form.CODED, levels=None)

    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the most bytes of all together."""
        return self.outer.nbytes_with(spec, self.rest)

    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Code everything."""
        return Encoded(self.outer.encode_with(value, spec, self.rest), None)

    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Return the values."""
        return self.outer.decode_with(section, spec, self.rest)


def join(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return stages with the first wrapping one, if any, and all after it as one."""
    for index, stage in enumerate(stages):
        if isinstance(stage, Wrapping):
            return (*stages[:index], Wrapped(stage, Rest(tuple(stages[index + 1 :]))))
    return tuple(stages)


def padded(size: int) -> int:
    """Return a size rounded up to a multiple of 8."""
    return -(-size // 8) * 8


def _malformed(detail: str) -> WireError:
    return WireError(WireReason.MALFORMED, f"wrapped stages: {detail}")
