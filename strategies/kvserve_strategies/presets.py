"""Named strategies: what a policy or a profiler starts from; names are DNS labels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_strategies.peers import PEERS
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    Centre,
    ConstantStep,
    ExponentCode,
    Fp8,
    Grid,
    Importance,
    Ladder,
    Lead,
    Mean,
    Metric,
    Pack,
    Pca,
    Rans,
    Raw,
    Recentre,
    Scale,
    TokenMinMax,
    Unrope,
)

_MEANS: Final = 0.1
"""Step of the means of pieces: finer ones cost bytes, and gain nothing that the tokens' own steps would not."""


def strategy(*, keys: tuple[Stage, ...], values: tuple[Stage, ...]) -> StrategyConfig:
    """Return the configuration of a strategy given by its stages."""
    return StrategyConfig(
        parts=tuple(
            Part(kind=kind, chain=tuple(stage.config for stage in stages))
            for kind, stages in ((Kind.KEYS, keys), (Kind.VALUES, values))
        )
    )


def _both(*stages: Stage) -> StrategyConfig:
    return strategy(keys=stages, values=stages)


def _centred(keys_step: float, values_step: float) -> StrategyConfig:
    """Return constant steps, entropy-coded: keys after centring, values after scaling, the first tokens exact."""
    return strategy(
        keys=(Lead(tokens=4), Centre(), ConstantStep(relative_step=keys_step), Rans(tables=16)),
        values=(Lead(tokens=4), Scale(), ConstantStep(relative_step=values_step), Rans(tables=16)),
    )


def joint(
    *, layers: int, heads: int, quantiser: Grid | Importance, sinks: int = 1, means: float = 0.0
) -> StrategyConfig:
    """Return keys and values coded together in the coordinates where errors cost equally.

    Args:
        layers: Layers a basis.
        heads: KV heads a basis, 0 for all.
        quantiser: One step for all, or finer ones where tokens matter more.
        sinks: First tokens of a request that are sent exactly.
        means: Step of the means of each piece, 0 to take those of calibration.
    """
    chain: tuple[Stage, ...] = (
        Unrope(),
        Mean(),
        Metric(metric="fisher"),
        Pca(layers=layers, heads=heads),
        *((Recentre(step=means),) if means else ()),
        quantiser,
        Ladder(),
    )
    return StrategyConfig(
        parts=(
            Part(kind="kv", tokens=f":{sinks}", chain=(Raw().config,)),
            Part(kind="kv", chain=tuple(stage.config for stage in chain)),
        )
    )


def _joint(layers: int, heads: int, step: float, *, means: float = 0.0) -> StrategyConfig:
    quantiser = Grid(step=step, dead_zone=1.0)
    return joint(layers=layers, heads=heads, quantiser=quantiser, means=means)


def _focus(layers: int, step: float) -> StrategyConfig:
    quantiser = Importance(step=step, dead_zone=1.0)
    return joint(layers=layers, heads=0, quantiser=quantiser, means=_MEANS)


PRESETS: Final[Mapping[str, StrategyConfig]] = MappingProxyType(
    {
        "none": _both(Raw()),
        "lossless": _both(ExponentCode(tables=16)),
        "fp8": _both(Fp8(), Pack()),
        "int8-token": _both(TokenMinMax(levels=256, group=0), Pack()),
        "int4-token": _both(TokenMinMax(levels=16, group=0), Pack()),
        "centred-rans-fine": _centred(0.3, 0.5),
        "centred-rans": _centred(0.5, 0.8),
        "centred-rans-coarse": _centred(0.8, 1.2),
        "joint-head": _joint(1, 1, 0.15),
        "joint-layer": _joint(1, 0, 0.15),
        "joint-3-fine": _joint(3, 0, 0.1, means=_MEANS),
        "joint-3": _joint(3, 0, 0.15, means=_MEANS),
        "joint-3-coarse": _joint(3, 0, 0.25, means=_MEANS),
        "joint-10": _joint(10, 0, 0.2, means=_MEANS),
        "focus-3-fine": _focus(3, 0.08),
        "focus-3": _focus(3, 0.15),
        "focus-3-coarse": _focus(3, 0.4),
        **PEERS,
    }
)
"""Every preset by its name."""


def preset(name: str) -> StrategyConfig:
    """Return a preset.

    Raises:
        StrategyError: There is none of this name.
    """
    if name not in PRESETS:
        raise StrategyError("preset", f"{name!r} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name]
