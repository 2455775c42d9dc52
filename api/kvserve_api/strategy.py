"""The JSON form of a strategy: which chain of stages codes which part of the KV cache.

A strategy is a list of parts. Each part names by its *split* what it covers and by its *chain* how that is coded:
``transform → predict → quantise → code``. What the stages mean, and which chains can work, is known to
`kvserve_strategies`; here is only the form, which every part of KVServe can carry, compare and digest without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self, TypeAlias

from kvserve_api.canonical import canonical_json, digest_bytes
from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields

SCHEMA = "kvserve.io/strategy/v1"
MAX_PARTS = 16
MAX_STAGES = 8
MAX_JSON_BYTES = 16_384

Scalar: TypeAlias = str | int | float | bool


class Kind(StrEnum):
    """Which half of the KV cache a part covers."""

    KEYS = "k"
    VALUES = "v"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One link of a chain.

    Attributes:
        id: The stage's id, like ``quantise.minmax.v1``; it means one byte format for ever.
        params: Its parameters, by name; scalars only.
    """

    id: str
    params: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id or len(self.id) > 64:
            raise StrategyError("id", "must have 1 to 64 characters")
        for name, value in self.params.items():
            if not isinstance(value, str | int | float | bool):
                raise StrategyError(f"{self.id}.{name}", f"must be a scalar, got {value!r}")
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))

    def __hash__(self) -> int:
        """Hash by content: a mapping proxy has no hash of its own."""
        return hash((self.id, tuple(sorted(self.params.items()))))

    def to_json(self) -> dict[str, Any]:
        """Return the stage as a flat object: ``{"id": …, **params}``."""
        return {"id": self.id, **self.params}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a stage; every key but ``id`` is a parameter."""
        value = fields.mapping_of()
        identity = fields.string("id", max_length=64)
        return cls(id=identity, params={k: v for k, v in value.items() if k != "id"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A chain and what it covers.

    Attributes:
        kind: Keys or values.
        chain: The stages in the order of encoding.
    """

    kind: Kind
    chain: tuple[StageConfig, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the part as an object."""
        return {"kind": self.kind.value, "chain": [stage.to_json() for stage in self.chain]}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a part."""
        kind = Kind(fields.string("kind", choices=[k.value for k in Kind]))
        stages = fields.children("chain", max_items=MAX_STAGES)
        fields.done()
        return cls(kind=kind, chain=tuple(StageConfig.from_json(stage) for stage in stages))


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """A whole strategy: exactly one part for the keys and one for the values.

    Raises:
        StrategyError: Parts are missing, doubled or empty.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if sorted(part.kind for part in self.parts) != [Kind.KEYS, Kind.VALUES]:
            raise StrategyError("parts", "must hold exactly one part for k and one for v")
        if any(not part.chain for part in self.parts):
            raise StrategyError("parts", "a chain must have at least one stage")

    def part(self, kind: Kind) -> Part:
        """Return the part that covers a kind."""
        return next(part for part in self.parts if part.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Return the strategy as an object."""
        parts = sorted(self.parts, key=lambda part: part.kind)
        return {"schema": SCHEMA, "parts": [part.to_json() for part in parts]}

    def canonical(self) -> bytes:
        """Return the canonical JSON, the identity of the strategy."""
        return canonical_json(self.to_json())

    @property
    def digest(self) -> str:
        """The digest of the canonical JSON."""
        return digest_bytes(self.canonical())

    @classmethod
    def from_json(cls, value: Any, path: str = "strategy") -> Self:
        """Read a strategy from parsed JSON.

        Raises:
            StrategyError: A key is missing, unknown or of the wrong type.
        """
        fields = Fields(value, path, error=StrategyError)
        fields.string("schema", choices=[SCHEMA])
        parts = fields.children("parts", max_items=MAX_PARTS)
        fields.done()
        return cls(parts=tuple(Part.from_json(part) for part in parts))
