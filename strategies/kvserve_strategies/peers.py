"""Named strategies that restate what other projects do, made of our stages; docs/peers.md says what differs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_strategies.stage import Stage
from kvserve_strategies.stages import (
    AbsMax,
    Centre,
    ChannelMinMax,
    ConstantStep,
    EscapeCode,
    Grid,
    Hadamard,
    Ladder,
    Lead,
    LloydMax,
    Mean,
    Pack,
    Pca,
    PredictLayer,
    Rans,
    Raw,
    Scale,
    TokenMinMax,
    Unrope,
)

_SIGNS: Final = 1


def part(
    kind: Kind | Literal["kv"],
    *stages: Stage,
    layers: str = "",
    heads: str = "",
    tokens: str = "",
) -> Part:
    """Return a part given by its stages; see `kvserve_api.strategy.Part` for the selectors."""
    chain = tuple(stage.config for stage in stages)
    return Part(kind=kind, chain=chain, layers=layers, heads=heads, tokens=tokens)


def _both(*stages: Stage) -> tuple[Part, ...]:
    return tuple(part(kind, *stages) for kind in Kind)


def _cachegen() -> StrategyConfig:
    """Return CacheGen (Liu et al., 2024) as LMCache 0.5.6 ships it, for models of 10 layers or more."""

    def levels(bins: int) -> tuple[Stage, ...]:
        return AbsMax(bins=bins, scope="token"), Rans(tables=16)

    return StrategyConfig(
        parts=(
            part(Kind.KEYS, *levels(32), layers=":10"),
            part(Kind.VALUES, *levels(32), layers=":2"),
            part(Kind.KEYS, *levels(16)),
            part(Kind.VALUES, *levels(16)),
        )
    )


def _turboquant(bits: int) -> StrategyConfig:
    """Return TurboQuant without its sketch (Zandieh et al., 2025): a rotation, then levels for normal values."""
    return StrategyConfig(parts=_both(Hadamard(seed=_SIGNS), LloydMax(bits=bits), Pack()))


def _turboquant_vllm(bits: int) -> StrategyConfig:
    """Return vLLM's turboquant cache: keys rotated, values by min-max, two layers at each end as they are."""
    return StrategyConfig(
        parts=(
            part("kv", Raw(), layers=":2,-2:"),
            part(Kind.KEYS, Hadamard(seed=_SIGNS), LloydMax(bits=bits), Pack()),
            part(Kind.VALUES, TokenMinMax(levels=1 << bits, group=0), Pack()),
        )
    )


def _kivi(levels: int) -> StrategyConfig:
    """Return KIVI (Liu et al., 2024) with groups of 64, without its window of recent tokens."""
    return StrategyConfig(
        parts=(
            part(Kind.KEYS, ChannelMinMax(levels=levels, group=64), Pack()),
            part(Kind.VALUES, TokenMinMax(levels=levels, group=64), Pack()),
        )
    )


def _kvtc(step: float) -> StrategyConfig:
    """Return KVTC (NVIDIA, 2025): principal components of un-rotated keys, and of values, over 3 layers each."""

    def chain(*first: Stage) -> tuple[Stage, ...]:
        return (*first, Mean(), Pca(layers=3, heads=0), Grid(step=step, dead_zone=0.0), Ladder())

    return StrategyConfig(
        parts=(
            part("kv", Raw(), tokens=":4"),
            part(Kind.KEYS, *chain(Unrope())),
            part(Kind.VALUES, *chain(Unrope())),
        )
    )


def _predicted() -> StrategyConfig:
    """Return AQUA-KV's idea (Shutova et al., 2025), prediction from the layer before, in front of constant steps."""

    def rest(step: float) -> tuple[Stage, ...]:
        return PredictLayer(sources=4), ConstantStep(relative_step=step), Rans(tables=4)

    return StrategyConfig(
        parts=(
            part(Kind.KEYS, Lead(tokens=4), Centre(), *rest(0.75)),
            part(Kind.VALUES, Lead(tokens=4), Scale(), *rest(0.9)),
        )
    )


def _kvserve_paper() -> StrategyConfig:
    """Return the default of the KVServe paper's artefact (arXiv 2605.13734) with its Hadamard transform switched on.

    Which heads get few levels comes, in the paper, from scores of each model's heads. A preset must fit any model: here
    the first head of each layer has many.
    """

    def keys(levels: int) -> tuple[Stage, ...]:
        return Hadamard(seed=_SIGNS), ChannelMinMax(levels=levels, group=0), Rans(tables=16)

    def values(levels: int) -> tuple[Stage, ...]:
        return Hadamard(seed=_SIGNS), TokenMinMax(levels=levels, group=0), Rans(tables=16)

    return StrategyConfig(
        parts=(
            part(Kind.KEYS, *keys(12), heads="0"),
            part(Kind.VALUES, *values(8), heads="0"),
            part(Kind.KEYS, *keys(6)),
            part(Kind.VALUES, *values(4)),
        )
    )


PEERS: Final[Mapping[str, StrategyConfig]] = MappingProxyType(
    {
        "splitzip": StrategyConfig(parts=_both(EscapeCode())),
        "int3-token": StrategyConfig(parts=_both(TokenMinMax(levels=8, group=0), Pack())),
        "int2-token": StrategyConfig(parts=_both(TokenMinMax(levels=4, group=0), Pack())),
        "int8-vllm": StrategyConfig(parts=_both(AbsMax(bins=256, scope="head"), Pack())),
        "int4-vllm": StrategyConfig(
            parts=_both(Hadamard(seed=_SIGNS), TokenMinMax(levels=16, group=0), Pack())
        ),
        "kivi-4": _kivi(16),
        "kivi-3": _kivi(8),
        "kivi-2": _kivi(4),
        "cachegen": _cachegen(),
        "turboquant-4": _turboquant(4),
        "turboquant-3": _turboquant(3),
        "turboquant-4-vllm": _turboquant_vllm(4),
        "predicted-rans": _predicted(),
        "kvserve-paper": _kvserve_paper(),
        "kvtc": _kvtc(0.7),
    }
)
"""Every restated peer by its name."""
