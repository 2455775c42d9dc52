"""What is cheap to know of every candidate: how far it compresses, how long that takes, and what it may lose.

Ratio and forecasts of the loss come from coding the KV cache of one window of each text. The time is a cost model by
the structure of a strategy: those that differ only in how finely they quantise run the same code over the same bytes,
so they share the least time that any of them took. It ranks candidates in a search; the times of the profiles that a
set holds are measured one by one.
"""

import itertools
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
from kvserve_profiler.quality import loss_bp, numbers
from kvserve_profiler.sensitivity import Sensitivity

T = TypeVar("T")
FINENESS: Final = frozenset(
    {"step", "relative_step", "dead_zone", "levels", "bits", "bins", "tables", "tokens"}
)
"""Parameters and selectors that change how much is lost, not what is done."""
_DIGITS: Final = 4
_KEY: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Cheap:
    """What is known of a candidate without a prediction of the model, to four digits.

    Attributes:
        ratio: Native bytes over the blob's.
        codec_s: Seconds to encode and decode a whole prefix.
        forecast_bp: For each text its forecasts of the loss, directed and scattered, in basis points; none if nothing
            was forecast.
    """

    ratio: float
    codec_s: float
    forecast_bp: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("ratio", "codec_s"):
            object.__setattr__(self, name, _short(getattr(self, name)))
        short = tuple((_short(one), _short(other)) for one, other in self.forecast_bp)
        object.__setattr__(self, "forecast_bp", short)


@dataclass(frozen=True, slots=True)
class Probe:
    """A window that candidates are screened on.

    Attributes:
        kv: The exact KV cache of its prefix.
        sensitivity: What errors of that cost; None to forecast nothing.
    """

    kv: KV
    sensitivity: Sensitivity | None = None


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
            key: None
            if cheap is None
            else [cheap.ratio, cheap.codec_s, *itertools.chain(*cheap.forecast_bp)]
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
            values = numbers(fields, key)
            if len(values) < 2 or len(values) % 2 or not (values[0] > 0 and values[1] > 0):
                raise fields.fail(
                    key, "must be a ratio and a time, both positive, and pairs of forecasts"
                )
            ratio, codec_s, *forecasts = values
            pairs = tuple(zip(forecasts[::2], forecasts[1::2], strict=True))
            found[key] = Cheap(ratio=ratio, codec_s=codec_s, forecast_bp=pairs)
        fields.done()
        return cls(found)


def screen(
    candidates: Sequence[Candidate],
    codec_of: Callable[[Candidate], Codec],
    probes: Sequence[Probe],
    native_bytes: int,
    tell: Callable[[int], None],
) -> Screening:
    """Code KV caches with every candidate.

    Args:
        candidates: What to screen.
        codec_of: Makes a candidate's codec.
        probes: A window of each text; ratio and time are those of the first.
        native_bytes: Size of the first one's cache.
        tell: Called with the number of candidates done.
    """
    ratios: dict[str, float] = {}
    forecasts: dict[str, tuple[tuple[float, float], ...]] = {}
    encode_s: dict[str, float] = {}
    decode_s: dict[str, float] = {}
    forecasts_wanted = probes[0].sensitivity is not None
    for done, candidate in enumerate(candidates):
        tell(done)
        structure = structure_of(candidate.strategy)
        try:
            codec = codec_of(candidate)
            # without a forecast decoding tells nothing but the time of the structure
            new = structure not in decode_s
            used = probes if forecasts_wanted and not codec.lossless else probes[:1]
            coded = [_code(codec, probe, decode=new or forecasts_wanted) for probe in used]
            if new:
                # the first call of a structure may compile
                coded[0] = _code(codec, probes[0], decode=True)
        # it may fail in any numeric way; what can't be coded is no candidate
        except (KVServeError, ArithmeticError, RuntimeError, ValueError):
            continue
        first = coded[0]
        ratios[candidate.strategy.digest] = native_bytes / first.wire_bytes
        encode_s[structure] = min(first.encode_s, encode_s.get(structure, first.encode_s))
        if first.decode_s is not None:
            decode_s[structure] = min(first.decode_s, decode_s.get(structure, first.decode_s))
        forecasts[candidate.strategy.digest] = tuple(
            one.forecast_bp for one in coded if one.forecast_bp is not None
        )
        if codec.lossless and forecasts_wanted:
            forecasts[candidate.strategy.digest] = ((0.0, 0.0),) * len(probes)
    found: dict[str, Cheap | None] = {}
    for candidate in candidates:
        structure = structure_of(candidate.strategy)
        ratio = ratios.get(candidate.strategy.digest)
        found[_key(candidate.strategy)] = (
            None
            if ratio is None
            else Cheap(
                ratio=ratio,
                codec_s=encode_s[structure] + decode_s[structure],
                forecast_bp=forecasts[candidate.strategy.digest],
            )
        )
    return Screening(found)


@dataclass(frozen=True, slots=True)
class _Coded:
    wire_bytes: int
    encode_s: float
    decode_s: float | None
    forecast_bp: tuple[float, float] | None


def _code(codec: Codec, probe: Probe, *, decode: bool) -> _Coded:
    encode_s, blob = timed(partial(codec.encode, probe.kv))
    if not decode:
        return _Coded(len(blob), encode_s, None, None)
    decode_s, decoded = timed(partial(codec.decode, blob, probe.kv.tokens))
    forecast_bp = None
    if probe.sensitivity is not None:
        forecast = probe.sensitivity.forecast(probe.kv, decoded)
        forecast_bp = (loss_bp(forecast.directed), loss_bp(forecast.scattered))
    return _Coded(len(blob), encode_s, decode_s, forecast_bp)


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


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _key(strategy: StrategyConfig) -> str:
    return short_digest(strategy.digest, _KEY)
