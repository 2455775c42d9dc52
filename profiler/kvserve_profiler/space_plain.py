"""The families of strategies that need no calibration, for the KV cache of a model."""

from collections.abc import Iterator, Mapping
from typing import Final

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_api.wire import KVLayout
from kvserve_profiler.space import Family
from kvserve_profiler.space_point import Parameter, ParameterKind, Point, Value
from kvserve_strategies.peers import part
from kvserve_strategies.presets import PRESETS
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    AbsMax,
    Centre,
    ChannelMinMax,
    ConstantStep,
    EscapeCode,
    ExponentCode,
    Fp8,
    Hadamard,
    Lead,
    LloydMax,
    Pack,
    PredictLayer,
    Rans,
    Raw,
    Scale,
    TokenMinMax,
)

_SIGNS: Final = 1
_TABLES: Final = 16
_RELATIVE_STEPS: Final = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3)
_ROTATE: Final = Parameter("rotated", ParameterKind.CATEGORICAL, ("no", "yes"))
_LEAD: Final = Parameter("lead", ParameterKind.ORDINAL, (0, 4))
_CODER: Final = Parameter("coder", ParameterKind.CATEGORICAL, ("pack", "rans"))
_FEWER: Final = Parameter("fewer", ParameterKind.CATEGORICAL, ("no", "yes"))
"""Whether values get two thirds of the levels of keys, or packed half of them."""


def plain_families(layout: KVLayout) -> tuple[Family, ...]:
    """Return the families for a layout, from no compression to splits of heads and layers."""
    return (
        _fixed("none", "raw"),
        *_uncalibrated(layout),
        *_split(layout),
        Family(
            "lossless", (Parameter("tables", ParameterKind.ORDINAL, (0, 1, 4, _TABLES)),), _lossless
        ),
        _fixed("cachegen"),
    )


def both(*stages: Stage) -> StrategyConfig:
    """Return the strategy that codes keys and values alike, each for itself."""
    return _apart(stages, stages)


def _uncalibrated(layout: KVLayout) -> Iterator[Family]:
    yield Family(
        "centred",
        (
            Parameter("step", ParameterKind.CONTINUOUS, _RELATIVE_STEPS),
            Parameter("spread", ParameterKind.CONTINUOUS, (1.0, 1.6, 2.5)),
            _LEAD,
            Parameter("values", ParameterKind.CATEGORICAL, ("centred", "scaled")),
            _ROTATE,
            Parameter("tables", ParameterKind.ORDINAL, (4, _TABLES)),
        ),
        _centred,
        tuple(
            _extra(step=step, spread=spread, lead=4, values="scaled", rotated="no", tables=_TABLES)
            for step, spread in ((0.3, 5 / 3), (0.8, 1.5))
        ),
    )
    yield Family(
        "predicted",
        (
            Parameter("step", ParameterKind.CONTINUOUS, _RELATIVE_STEPS[1:-1]),
            Parameter("spread", ParameterKind.CONTINUOUS, (1.0, 1.6, 2.5)),
            _LEAD,
            Parameter("sources", ParameterKind.ORDINAL, (1, 4)),
        ),
        _predicted,
        (_extra(step=0.75, spread=1.2, lead=4, sources=4),),
    )
    yield Family(
        "minmax",
        (
            Parameter("keys", ParameterKind.CATEGORICAL, ("channel", "token")),
            Parameter("levels", ParameterKind.ORDINAL, (3, 4, 6, 8, 12, 16, 32, 64, 256)),
            Parameter("group", ParameterKind.ORDINAL, (0, 64)),
            _FEWER,
            _ROTATE,
            _LEAD,
            _CODER,
        ),
        lambda point: _minmax(point, layout),
    )
    yield Family(
        "absmax",
        (
            Parameter("scope", ParameterKind.CATEGORICAL, ("token", "head")),
            Parameter("levels", ParameterKind.ORDINAL, (8, 16, 32, 64, 256)),
            _ROTATE,
            _LEAD,
            _CODER,
        ),
        _absmax,
    )
    yield Family(
        "lloyd",
        (
            Parameter("bits", ParameterKind.ORDINAL, (2, 3, 4)),
            Parameter("values", ParameterKind.CATEGORICAL, ("lloyd", "minmax")),
            Parameter("edges", ParameterKind.ORDINAL, (0, 2)),
            _LEAD,
            _CODER,
        ),
        lambda point: _lloyd(point, layout),
    )
    yield Family("fp8", (_ROTATE, _LEAD, _CODER), _fp8)


def _split(layout: KVLayout) -> Iterator[Family]:
    """Yield the family in which some heads or layers get more levels than the others."""
    third = -(-layout.layers // 3)
    ways: dict[str, dict[str, str]] = {}
    if layout.kv_heads > 1:
        ways["head"] = {"heads": "0"}
    if layout.layers > 2:
        ways["third"] = {"layers": f":{third}"}
    if layout.layers > 4:
        ways["edges"] = {"layers": ":2,-2:"}
    if not ways:
        return

    def build(point: Point) -> StrategyConfig:
        high, low = point.count("levels"), point.count("low")
        if low >= high:
            raise StrategyError("low", f"must be below levels, {high}, got {low}")

        def parts(levels: int, selected: Mapping[str, str]) -> Iterator[Part]:
            first = (*_lead(point), *_rotation(point))
            rans = Rans(tables=_TABLES)
            keys = ChannelMinMax(levels=levels, group=0)
            yield part(Kind.KEYS, *first, keys, rans, **selected)
            values = TokenMinMax(levels=_levels(point, levels), group=0)
            yield part(Kind.VALUES, *first, values, rans, **selected)

        return StrategyConfig(parts=(*parts(high, ways[str(point["by"])]), *parts(low, {})))

    yield Family(
        "split",
        (
            Parameter("by", ParameterKind.CATEGORICAL, tuple(ways)),
            Parameter("levels", ParameterKind.ORDINAL, (8, 12, 16, 32)),
            Parameter("low", ParameterKind.ORDINAL, (4, 6, 8)),
            _FEWER,
            _ROTATE,
            _LEAD,
        ),
        build,
    )


def _lossless(point: Point) -> StrategyConfig:
    tables = point.count("tables")
    return both(ExponentCode(tables=tables) if tables else EscapeCode())


def _fixed(name: str, family: str = "") -> Family:
    """Return the family that is one preset."""
    return Family(family or name, (), lambda _: PRESETS[name])


def _centred(point: Point) -> StrategyConfig:
    keys_step, values_step = _two_steps(point)
    rans = Rans(tables=point.count("tables"))
    turn = _rotation(point)
    values: Stage = Centre() if point["values"] == "centred" else Scale()
    return _apart(
        (*_lead(point), Centre(), *turn, ConstantStep(relative_step=keys_step), rans),
        (*_lead(point), values, *turn, ConstantStep(relative_step=values_step), rans),
    )


def _predicted(point: Point) -> StrategyConfig:
    keys_step, values_step = _two_steps(point)
    predict, rans = PredictLayer(sources=point.count("sources")), Rans(tables=4)
    return _apart(
        (*_lead(point), Centre(), predict, ConstantStep(relative_step=keys_step), rans),
        (*_lead(point), Scale(), predict, ConstantStep(relative_step=values_step), rans),
    )


def _minmax(point: Point, layout: KVLayout) -> StrategyConfig:
    levels, group = point.count("levels"), point.count("group")
    keys: Stage = ChannelMinMax(levels=levels, group=group)
    if point["keys"] == "token":
        if group >= layout.head_dim:
            raise StrategyError("group", f"must be 0 or less than a head of {layout.head_dim}")
        keys = TokenMinMax(levels=levels, group=group)
    values_levels = _levels(point, levels)
    values = TokenMinMax(levels=values_levels, group=group)
    first, coder = (*_lead(point), *_rotation(point)), _coder(point, levels, values_levels)
    return _apart((*first, keys, coder), (*first, values, coder))


def _absmax(point: Point) -> StrategyConfig:
    bins = point.count("levels")
    quantiser = AbsMax(bins=bins, scope=str(point["scope"]))
    return both(*_lead(point), *_rotation(point), quantiser, _coder(point, bins))


def _lloyd(point: Point, layout: KVLayout) -> StrategyConfig:
    edges, bits = point.count("edges"), point.count("bits")
    if 2 * edges >= layout.layers:
        raise StrategyError("edges", f"must leave some of {layout.layers} layers, got {edges}")
    coder = _coder(point, 1 << bits)
    lloyd = (Hadamard(seed=_SIGNS), LloydMax(bits=bits))
    minmax = (TokenMinMax(levels=1 << bits, group=0),)
    values = lloyd if point["values"] == "lloyd" else minmax
    raw = (part("kv", Raw(), layers=f":{edges},-{edges}:"),) if edges else ()
    coded = _apart((*_lead(point), *lloyd, coder), (*_lead(point), *values, coder)).parts
    return StrategyConfig(parts=(*raw, *coded))


def _fp8(point: Point) -> StrategyConfig:
    return both(*_lead(point), *_rotation(point), Fp8(), _coder(point, 256))


def _apart(keys: tuple[Stage, ...], values: tuple[Stage, ...]) -> StrategyConfig:
    return StrategyConfig(parts=(part(Kind.KEYS, *keys), part(Kind.VALUES, *values)))


def _lead(point: Point) -> tuple[Stage, ...]:
    lead = point.count("lead")
    return (Lead(tokens=lead),) if lead else ()


def _rotation(point: Point) -> tuple[Stage, ...]:
    return (Hadamard(seed=_SIGNS),) if point["rotated"] == "yes" else ()


def _coder(point: Point, *levels: int) -> Stage:
    """Return the coder; packing takes only numbers of levels that fill their bits."""
    if point["coder"] == "rans":
        return Rans(tables=_TABLES)
    for count in levels:
        if count & (count - 1):
            raise StrategyError("levels", f"packed take the bits of a power of two, got {count}")
    return Pack()


def _levels(point: Point, keys: int) -> int:
    """Return the levels of values."""
    if point["fewer"] == "no":
        return keys
    return keys // 2 if point.get("coder") == "pack" else round(keys * 2 / 3)


def _two_steps(point: Point) -> tuple[float, float]:
    """Return the steps of keys and of values, which are ``spread`` times as wide."""
    step = point.number("step")
    return step, float(f"{step * point.number('spread'):.4g}")


def _extra(**values: Value) -> Mapping[str, Value]:
    return values
