"""What a stage is: one link of a chain, with a typed input and output.

A chain runs ``transform → predict → quantise → code``. Each stage sees the spec its predecessor produced, writes one
section of the payload, and hands on a value; the coder, always last, writes its section and hands on nothing. An id
means one byte format for ever: a change of a single byte is a new id.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_api.strategy import Kind, Scalar, StageConfig
from kvserve_api.wire import BYTES, DTYPE_BYTES
from kvserve_strategies.bundle import Bundle

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


class Role(StrEnum):
    """Where in a chain a stage stands; roles follow each other in this order."""

    TRANSFORM = "transform"
    PREDICT = "predict"
    QUANTISE = "quantise"
    CODE = "code"


class Form(StrEnum):
    """What flows between two stages, each ``[layers, tokens, kv_heads, head_dim]``.

    NATIVE is the cache's own dtype (bfloat16 as the uint16 of its bits), REAL float32, LEVELS integers: uint8 if the
    spec bounds them, else int16. CODED is nothing more: the coder has written its section.
    """

    NATIVE = "native"
    REAL = "real"
    LEVELS = "levels"
    CODED = "coded"


class Space(StrEnum):
    """What a value's coordinates mean, as far as calibration is concerned; a metric's name is a space too."""

    NATIVE = "native"
    UNROPED = "unroped"
    CENTRED = "centred"
    COMPONENTS = "components"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Which cells of a model's cache a piece holds.

    Attributes:
        kinds: Keys, values or both; if both, the first half of the piece's layers are keys.
        layers: The layers of the model.
        heads: KV heads; those of one tensor-parallel rank are counted from 0.
        first_token: Position in the request of the piece's first token.
        tokens_after: Tokens of the request that follow the piece; only encoders look at it, to judge what matters.
    """

    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    first_token: int
    tokens_after: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """The type of a value between two stages.

    Attributes:
        form: See `Form`.
        layers: Layers in this piece of the cache.
        tokens: Tokens in it.
        kv_heads: KV heads.
        head_dim: Size of a head.
        dtype: The cache's dtype, whatever the form.
        levels: For LEVELS the number of codes, 2 to 256, starting at 0; None if they are any int16.
        space: What the coordinates mean.
        where: Which cells these are; None where only the form matters.
        bundle: The calibration that the strategy was built with, or None.
    """

    form: Form
    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    levels: int | None = None
    space: str = Space.NATIVE
    where: Where | None = None
    bundle: Bundle | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("layers", "tokens", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise StrategyError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise StrategyError(
                "dtype", f"must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(layers, tokens, kv_heads, head_dim)``."""
        return self.layers, self.tokens, self.kv_heads, self.head_dim

    @property
    def columns(self) -> int:
        """Values of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def count(self) -> int:
        """Number of values."""
        return self.layers * self.tokens * self.kv_heads * self.head_dim

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The numpy type of the value; of what is kept beside a NATIVE or REAL value, too."""
        if self.form == Form.LEVELS:
            return np.dtype(np.int16 if self.levels is None else np.uint8)
        if self.form == Form.NATIVE and self.dtype == "bfloat16":
            return np.dtype(np.uint16)
        if self.form == Form.NATIVE and self.dtype == "float16":
            return np.dtype(np.float16)
        if self.form == Form.NATIVE and self.dtype == BYTES:
            return np.dtype(np.uint8)
        return np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a stage made of a value.

    Attributes:
        section: What it writes into the payload, in pieces that follow each other; each contiguous.
        value: What it hands on; None from a coder.
    """

    section: tuple[Array, ...]
    value: Array | None


class Stage(ABC):
    """One link of a chain: a frozen dataclass of its parameters.

    Attributes:
        id: ``<role>.<name>.v<version>``; one byte format for ever.
        role: Where in a chain it stands.
        lossless: Decoding gives back the value bit by bit.
        is_fixed_size: `encoded_nbytes` is exact, for every value.
        summary: One line for people.
        calibrated: It needs the calibration bundle of the model.
        takes_bytes: It carries values that are not numbers too.
    """

    __slots__ = ()

    id: ClassVar[str]
    role: ClassVar[Role]
    lossless: ClassVar[bool]
    is_fixed_size: ClassVar[bool]
    summary: ClassVar[str]
    calibrated: ClassVar[bool] = False
    takes_bytes: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, params: Fields) -> Self:
        """Read the parameters, every one of them required.

        Raises:
            StrategyError: One is missing, out of range, or not known.
        """

    @property
    def config(self) -> StageConfig:
        """The stage as configuration."""
        params: dict[str, Scalar] = {
            field.name: getattr(self, field.name)
            for field in fields(self)  # type: ignore[arg-type]
        }
        return StageConfig(id=self.id, params=params)

    @abstractmethod
    def resolve(self, spec: Spec) -> Spec:
        """Return the spec of what the stage hands on.

        Raises:
            StrategyError: It can't take such a value.
        """

    @abstractmethod
    def encoded_nbytes(self, spec: Spec) -> int:
        """Return the most bytes its section can have, without encoding."""

    @abstractmethod
    def encode(self, value: Array, spec: Spec) -> Encoded:
        """Encode a value of a spec; the value is finite if the stage is not lossless.

        Raises:
            ValuesError: It can't carry these values.
        """

    @abstractmethod
    def decode(self, section: Bytes, value: Array | None, spec: Spec) -> Array:
        """Undo `encode`; every byte of the section may be hostile.

        Args:
            section: What `encode` wrote, aligned to 8 bytes.
            value: What `encode` handed on, as decoded by the next stage; None for a coder.
            spec: The spec of the result.

        Raises:
            WireError: The section is not one that `encode` writes.
        """


def take_space(stage: Stage, spec: Spec, *spaces: str) -> None:
    """Refuse a spec whose coordinates the stage was not calibrated for."""
    if spec.space not in spaces:
        raise StrategyError(
            stage.id, f"takes {' or '.join(spaces)} values, its predecessor gives {spec.space}"
        )


def take_form(stage: Stage, spec: Spec, *forms: Form) -> None:
    """Refuse a spec whose form the stage does not take."""
    if spec.form not in forms:
        wanted = " or ".join(forms)
        raise StrategyError(stage.id, f"takes {wanted} values, its predecessor gives {spec.form}")
