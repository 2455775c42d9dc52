"""Named strategies: what a policy or a profiler starts from; names are DNS labels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    Centre,
    ChannelMinMax,
    ConstantStep,
    ExponentCode,
    Fp8,
    Lead,
    Pack,
    Rans,
    Raw,
    Scale,
    TokenMinMax,
)


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


def _kivi(levels: int) -> StrategyConfig:
    """Return KIVI (Liu et al., 2024) with groups of 64: keys per channel, values per token."""
    return strategy(
        keys=(ChannelMinMax(levels=levels, group=64), Pack()),
        values=(TokenMinMax(levels=levels, group=64), Pack()),
    )


def _centred(keys_step: float, values_step: float) -> StrategyConfig:
    """Return constant steps, entropy-coded: keys after centring, values after scaling, the first tokens exact."""
    return strategy(
        keys=(Lead(tokens=4), Centre(), ConstantStep(relative_step=keys_step), Rans(tables=16)),
        values=(Lead(tokens=4), Scale(), ConstantStep(relative_step=values_step), Rans(tables=16)),
    )


PRESETS: Final[Mapping[str, StrategyConfig]] = MappingProxyType(
    {
        "none": _both(Raw()),
        "lossless": _both(ExponentCode(tables=16)),
        "fp8": _both(Fp8(), Pack()),
        "int8-token": _both(TokenMinMax(levels=256, group=0), Pack()),
        "int4-token": _both(TokenMinMax(levels=16, group=0), Pack()),
        "kivi-4": _kivi(16),
        "kivi-2": _kivi(4),
        "centred-rans-fine": _centred(0.3, 0.5),
        "centred-rans": _centred(0.5, 0.8),
        "centred-rans-coarse": _centred(0.8, 1.2),
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
