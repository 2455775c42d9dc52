"""What is cheap to know of every candidate: how far it compresses, and how long that takes.

The ratio comes from encoding one cached KV. The time is a cost model by the structure of a strategy: those that differ
only in how finely they quantise run the same code over the same bytes, so they share the least time that any of them
took. It ranks candidates in a search; the times of the profiles that a set holds are measured one by one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self, TypeVar

from kvserve_api.canonical import canonical_json, short_digest
from kvserve_api.errors import KVServeError
from kvserve_api.fields import Fields
from kvserve_api.strategy import StrategyConfig
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.codec import Codec
from kvserve_profiler.model import KV
from kvserve_profiler.quality import numbers

T = TypeVar("T")
FINENESS: Final = frozenset(
    {"step", "relative_step", "dead_zone", "levels", "bits", "bins", "tables", "tokens"}
)
"""Parameters and selectors that change how much is lost, not what is done."""
REPEATS: Final = 1
"""Decodes, and further encodes, of one strategy of each structure."""
_DIGITS: Final = 4
_KEY: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Cheap:
    """What is known of a candidate without a prediction of the model, to four digits.

    Attributes:
        ratio: Native bytes over the blob's.
        codec_s: Seconds to encode and decode a whole prefix.
    """

    ratio: float
    codec_s: float

    def __post_init__(self) -> None:
        for name in ("ratio", "codec_s"):
            object.__setattr__(self, name, float(f"{getattr(self, name):.{_DIGITS}g}"))


@dataclass(frozen=True, slots=True)
class Screening:
    """The candidates that were screened.

    Attributes:
        found: For each, by the beginning of its strategy's digest, what is known; None if it can't encode this cache.
    """

    found: Mapping[str, Cheap | None]

    def __contains__(self, strategy: StrategyConfig) -> bool:
        return _key(strategy) in self.found

    def of(self, strategy: StrategyConfig) -> Cheap | None:
        """Return what is known of a strategy; None if that is nothing."""
        return self.found.get(_key(strategy))

    def to_json(self) -> dict[str, Any]:
        """Return the screening as an object."""
        return {
            key: None if cheap is None else [cheap.ratio, cheap.codec_s]
            for key, cheap in self.found.items()
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a screening."""
        found: dict[str, Cheap | None] = {}
        for key in fields.mapping_of():
            if fields.raw(key, None) is None:
                found[key] = None
                continue
            ratio, codec_s = (*numbers(fields, key), 0.0, 0.0)[:2]
            if not (ratio > 0 and codec_s > 0):
                raise fields.fail(key, "must be a ratio and a time, both positive")
            found[key] = Cheap(ratio=ratio, codec_s=codec_s)
        fields.done()
        return cls(found)


def screen(
    candidates: Sequence[Candidate],
    codec_of: Callable[[Candidate], Codec],
    kv: KV,
    native_bytes: int,
    tell: Callable[[int], None],
) -> Screening:
    """Encode a KV cache with every candidate.

    Args:
        candidates: What to screen.
        codec_of: Makes a candidate's codec.
        kv: The cache.
        native_bytes: Its size.
        tell: Called with the number of candidates done.
    """
    ratios: dict[str, float] = {}
    encode_s: dict[str, float] = {}
    decode_s: dict[str, float] = {}
    for done, candidate in enumerate(candidates):
        tell(done)
        structure = structure_of(candidate.strategy)
        try:
            codec = codec_of(candidate)
            spent_s, blob = timed(partial(codec.encode, kv))
            if structure not in decode_s:
                # the first call of a structure may compile
                again = [timed(partial(codec.encode, kv))[0] for _ in range(REPEATS)]
                decoding = partial(codec.decode, blob, kv.tokens)
                decode_s[structure] = min(timed(decoding)[0] for _ in range(REPEATS))
                spent_s = min(again)
        # it may fail in any numeric way; what can't be coded is no candidate
        except (KVServeError, ArithmeticError, RuntimeError, ValueError):
            continue
        ratios[candidate.strategy.digest] = native_bytes / len(blob)
        encode_s[structure] = min(spent_s, encode_s.get(structure, spent_s))
    found: dict[str, Cheap | None] = {}
    for candidate in candidates:
        structure = structure_of(candidate.strategy)
        ratio = ratios.get(candidate.strategy.digest)
        found[_key(candidate.strategy)] = (
            None
            if ratio is None
            else Cheap(ratio=ratio, codec_s=encode_s[structure] + decode_s[structure])
        )
    return Screening(found)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Return the processor time that an action took, in seconds and more than none, and its result."""
    start_s = time.thread_time()
    result = action()
    return max(time.thread_time() - start_s, 1e-9), result


def structure_of(strategy: StrategyConfig) -> str:
    """Return what strategies have in common that take the same time: parts and stages, not how fine these are."""
    return canonical_json([_without_fineness(part.to_json()) for part in strategy.parts]).decode()


def _without_fineness(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_fineness(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_fineness(item) for k, item in value.items() if k not in FINENESS}
    return value


def _key(strategy: StrategyConfig) -> str:
    return short_digest(strategy.digest, _KEY)
