"""Calibrated strategies that work with the small bundle, every calibrated stage among them."""

from itertools import product
from typing import Final

from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    ConstantStep,
    Grid,
    Importance,
    Ladder,
    Mean,
    Metric,
    Pca,
    Rans,
    Raw,
    Recentre,
    Scale,
    TokenMinMax,
    Unrope,
)


def joint(*stages: Stage, sinks: int = 0) -> StrategyConfig:
    """Return a strategy of one chain for keys and values together, maybe with exact first tokens."""
    first = [Part(kind="kv", tokens=f":{sinks}", chain=(Raw().config,))] if sinks else []
    return StrategyConfig(parts=(*first, Part(kind="kv", chain=tuple(s.config for s in stages))))


def apart(*stages: Stage) -> StrategyConfig:
    """Return a strategy of one chain for keys and values, each alone."""
    chain = tuple(stage.config for stage in stages)
    return StrategyConfig(parts=tuple(Part(kind=kind, chain=chain) for kind in Kind))


def grid(step: float, *, layers: int = 2, heads: int = 0, metric: str = "") -> tuple[Stage, ...]:
    """Return the stages of a projection."""
    before: tuple[Stage, ...] = (Metric(metric=metric),) if metric else ()
    return (
        Unrope(),
        Mean(),
        *before,
        Pca(layers=layers, heads=heads),
        Grid(step=step, dead_zone=0.3),
        Ladder(),
    )


def recentred(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return the stages with the means of each piece sent after its components."""
    at = next(index for index, stage in enumerate(stages) if isinstance(stage, Pca)) + 1
    return (*stages[:at], Recentre(step=0.04), *stages[at:])


_SPACES: Final = {
    f"{name}-{layers}x{heads}-{metric or 'centred'}": make(
        *grid(0.05, layers=layers, heads=heads, metric=metric)
    )
    for (name, make), (layers, heads), metric in product(
        (("joint", joint), ("apart", apart)), ((1, 1), (1, 0), (2, 0)), ("", "even")
    )
}
_IMPORTANT: Final = tuple(
    Importance(step=0.021, dead_zone=0.0) if isinstance(stage, Grid) else stage
    for stage in grid(0.05, metric="even")
)
_OTHERS: Final = {
    "importance": joint(*_IMPORTANT),
    "importance-sinks": joint(*_IMPORTANT, sinks=4),
    "importance-heads": apart(
        *(Pca(layers=1, heads=1) if isinstance(stage, Pca) else stage for stage in _IMPORTANT)
    ),
    "unrope-step": apart(Unrope(), Mean(), ConstantStep(relative_step=0.02), Rans(tables=4)),
    "metric-token": joint(
        Unrope(), Mean(), Metric(metric="even"), TokenMinMax(levels=256, group=0), Rans(tables=4)
    ),
    "pca-step": joint(
        Unrope(), Mean(), Pca(layers=2, heads=0), ConstantStep(relative_step=0.02), Rans(tables=4)
    ),
    "pca-scale": joint(
        Unrope(),
        Mean(),
        Metric(metric="even"),
        Pca(layers=1, heads=0),
        Scale(),
        ConstantStep(relative_step=0.02),
        Ladder(),
    ),
    "grid-rans": joint(*grid(0.05)[:-1], Rans(tables=8)),
    "sinks": joint(*grid(0.05), sinks=4),
    "recentre": joint(*recentred(grid(0.05, metric="even"))),
    "recentre-apart": apart(*recentred(grid(0.05, layers=1, heads=1)[:-1]), Rans(tables=8)),
    "recentre-importance": joint(*recentred(_IMPORTANT), sinks=4),
}
CALIBRATED_CONFIGS: Final[dict[str, StrategyConfig]] = _SPACES | _OTHERS
