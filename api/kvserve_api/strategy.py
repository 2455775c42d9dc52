"""The JSON form of a strategy: which chain of stages codes which part of the KV cache.

A strategy is a list of parts. Each part names by its *split* what it covers and by its *chain* how that is coded:
``transform → predict → quantise → code``. What the stages mean, and which chains can work, is known to
`kvserve_strategies`; here is only the form, which every part of KVServe can carry, compare and digest without torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Literal, Self, TypeAlias

from kvserve_api.canonical import canonical_json, digest_bytes
from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields

SCHEMA = "kvserve.io/strategy/v1"
MAX_PARTS = 16
MAX_STAGES = 8
MAX_JSON_BYTES = 16_384
MAX_SELECTOR = 64
MAX_TOKENS_APART = 65_535

Scalar: TypeAlias = str | int | float | bool


class Kind(StrEnum):
    """One half of the KV cache."""

    KEYS = "k"
    VALUES = "v"


JOINT: Final = "kv"
"""The kind of a part that codes keys and values together."""
_SLICE = re.compile(r"(-?\d+)|(-?\d+)?:(-?\d+)?")
_TOKENS = re.compile(r":([1-9]\d*)|-([1-9]\d*):")


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

    A cell of the cache is one layer, head and token of the keys or of the values. Of a strategy's parts the first that
    selects a cell codes it. An empty selector selects all.

    Attributes:
        kind: Keys, values, or ``"kv"`` for both together; a joint part takes cells whose key and value are both free.
        chain: The stages in the order of encoding.
        layers: Layers of the model, as Python slices separated by commas: ``"0:2,-2:"``, ``"7"``.
        heads: KV heads, in the same notation; those of one tensor-parallel rank.
        tokens: ``":4"``, the first 4 positions of the request (attention sinks), or ``"-64:"``, the last 64 tokens of
            the piece that is coded; see `StrategyConfig.before`.

    Raises:
        StrategyError: The chain is empty, or a selector is of another form.
    """

    kind: Kind | Literal["kv"]
    chain: tuple[StageConfig, ...]
    layers: str = ""
    heads: str = ""
    tokens: str = ""

    def __post_init__(self) -> None:
        if not self.chain:
            raise StrategyError("parts", "a chain must have at least one stage")
        for name in ("layers", "heads"):
            text = getattr(self, name)
            if len(text) > MAX_SELECTOR or (
                text and not all(_SLICE.fullmatch(item) and item for item in text.split(","))
            ):
                raise StrategyError(name, f"must be slices like '0:2,-2:', got {text!r}")
        if self.tokens:
            match = _TOKENS.fullmatch(self.tokens)
            if match is None or int(match[1] or match[2]) > MAX_TOKENS_APART:
                raise StrategyError(
                    "tokens",
                    f"must be like ':4' or '-64:', at most {MAX_TOKENS_APART} tokens, got "
                    f"{self.tokens!r}",
                )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The halves of the cache that it covers."""
        return tuple(Kind) if self.kind == JOINT else (Kind(self.kind),)

    @property
    def selects_all(self) -> bool:
        """Whether it takes every cell of its kinds that no part before it took."""
        return not (self.layers or self.heads or self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the part as an object; selectors that select all are left out."""
        split = {"layers": self.layers, "heads": self.heads, "tokens": self.tokens}
        chain = [stage.to_json() for stage in self.chain]
        return {"kind": str(self.kind), "chain": chain} | {k: v for k, v in split.items() if v}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a part."""
        kind = fields.string("kind", choices=[*(k.value for k in Kind), JOINT])
        stages = fields.children("chain", max_items=MAX_STAGES)
        split = {
            name: fields.string(name, "", max_length=MAX_SELECTOR)
            for name in ("layers", "heads", "tokens")
        }
        fields.done()
        return cls(
            kind="kv" if kind == JOINT else Kind(kind),
            chain=tuple(StageConfig.from_json(stage) for stage in stages),
            **split,
        )


def select_indices(text: str, size: int) -> frozenset[int]:
    """Return the indices below ``size`` that slices select; all for an empty text.

    Args:
        text: Slices separated by commas; a single index that is out of range selects nothing.
        size: How many layers or heads there are.
    """
    if not text:
        return frozenset(range(size))
    chosen: set[int] = set()
    for item in text.split(","):
        first, colon, stop = item.partition(":")
        if not colon:
            index = int(first) + (size if int(first) < 0 else 0)
            chosen.update({index} & set(range(size)))
            continue
        chosen.update(range(size)[int(first) if first else None : int(stop) if stop else None])
    return frozenset(chosen)


def select_tokens(text: str, tokens: range) -> range:
    """Return the positions of a piece that a token selector selects; all for an empty text.

    Args:
        text: ``":n"`` counts from the request's first token, ``"-n:"`` from the piece's last.
        tokens: The positions of the piece.
    """
    match = _TOKENS.fullmatch(text) if text else None
    if match is None:
        return tokens
    if match[1]:
        return range(tokens.start, max(tokens.start, min(tokens.stop, int(match[1]))))
    return range(max(tokens.start, tokens.stop - int(match[2])), tokens.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """A whole strategy: parts that together cover every cell of the cache.

    Raises:
        StrategyError: A cell may be left over, or a part can never be reached.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise StrategyError("parts", f"must be 1 to {MAX_PARTS}, got {len(self.parts)}")
        covered: set[Kind] = set()
        split: set[Kind] = set()
        for number, part in enumerate(self.parts):
            if covered.issuperset(part.kinds):
                raise StrategyError(
                    f"parts[{number}]", "is never reached: parts before it cover all of its kind"
                )
            if part.kind == JOINT and covered:
                raise StrategyError(
                    f"parts[{number}]",
                    "is never reached: a part before it covers all keys or all values, and a joint "
                    "part takes cells whose key and value are both free",
                )
            # a joint part leaves over the cells of which a part before it took only one half
            if part.selects_all and not (part.kind == JOINT and split):
                covered.update(part.kinds)
            elif len(part.kinds) == 1:
                split.update(part.kinds)
        if missing := [kind.value for kind in Kind if kind not in covered]:
            raise StrategyError(
                "parts",
                f"must end with parts that select all of {' and of '.join(missing)}: some cells of "
                "the cache would not be coded",
            )

    def before(self, tokens_after: int) -> Self:
        """Return the strategy for a piece that so many more tokens of the request follow.

        A selector like ``"-64:"`` counts from a piece's end. Here it is made to count from the request's: of a request
        in pieces only the last 64 tokens are then apart, as in one piece. What a piece was coded with stands in its
        header, so decoders need not know.

        Args:
            tokens_after: Tokens that follow the piece.
        """
        if tokens_after <= 0 or not any(part.tokens.startswith("-") for part in self.parts):
            return self
        parts: list[Part] = []
        for part in self.parts:
            if not part.tokens.startswith("-"):
                parts.append(part)
            elif (left := int(part.tokens[1:-1]) - tokens_after) > 0:
                parts.append(replace(part, tokens=f"-{left}:"))
        try:
            return type(self)(parts=tuple(parts))
        except StrategyError:
            # a joint part would now take what was left to parts after it: then every piece keeps its end apart
            return self

    def chains(self) -> Iterator[tuple[str, Part]]:
        """Yield each part under a name for people: its kind, and its split where it has one."""
        for part in self.parts:
            split = {"layers": part.layers, "heads": part.heads, "tokens": part.tokens}
            words = [f"{name} {text}" for name, text in split.items() if text]
            yield " ".join([str(part.kind), *words]), part

    def to_json(self) -> dict[str, Any]:
        """Return the strategy as an object."""
        parts = self.parts
        # without selectors the order of keys and values means nothing, and must not make two identities
        if all(part.selects_all for part in parts):
            parts = tuple(sorted(parts, key=lambda part: str(part.kind)))
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
