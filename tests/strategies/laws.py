"""The laws every strategy obeys, and what it takes to check them for each registered stage."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_api.strategy import Kind, StrategyConfig
from kvserve_kernels import hadamard
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.presets import strategy
from kvserve_strategies.registry import make_stage
from kvserve_strategies.split import Extent, cut
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
    Ladder,
    Lead,
    LloydMax,
    Pack,
    PredictLayer,
    Rans,
    Raw,
    Scale,
    TokenMinMax,
)
from kvserve_strategies.stages.hadamard import signs
from kvserve_strategies.stages.lloyd import centroids

Real = NDArray[np.float64]
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
# half a unit in the last place, relative; and the spacing of the least numbers
ROUNDING: Final = {
    torch.bfloat16: (2.0**-8, 1e-38),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.float32: (2.0**-24, 1e-38),
}
FLOAT32: Final = 2.0**-22


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A chain that exercises a stage."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def config(self) -> StrategyConfig:
        """The chain for keys and values alike."""
        return strategy(keys=self.stages, values=self.stages)


STAGE_CASES: Final = (
    Case(name="raw", stages=(Raw(),)),
    Case(name="exponent", stages=(ExponentCode(tables=16),)),
    Case(name="exponent-1-table", stages=(ExponentCode(tables=1),)),
    Case(name="escape", stages=(EscapeCode(),)),
    Case(name="lead-escape", stages=(Lead(tokens=2), EscapeCode())),
    Case(name="lead-raw", stages=(Lead(tokens=3), Raw())),
    Case(name="fp8-pack", stages=(Fp8(), Pack())),
    Case(name="fp8-rans", stages=(Fp8(), Rans(tables=4))),
    *(
        Case(
            name=f"token-{levels}-{group}", stages=(TokenMinMax(levels=levels, group=group), Pack())
        )
        for levels, group in ((256, 0), (16, 0), (16, 7), (5, 3), (2, 1))
    ),
    *(
        Case(
            name=f"channel-{levels}-{group}",
            stages=(ChannelMinMax(levels=levels, group=group), Pack()),
        )
        for levels, group in ((256, 0), (16, 8), (4, 64), (3, 1))
    ),
    *(
        Case(name=f"absmax-{bins}-{scope}", stages=(AbsMax(bins=bins, scope=scope), Pack()))
        for bins, scope in ((256, "head"), (32, "token"), (16, "token"), (5, "head"))
    ),
    Case(name="absmax-rans", stages=(AbsMax(bins=16, scope="token"), Rans(tables=16))),
    *(Case(name=f"lloyd-{bits}", stages=(LloydMax(bits=bits), Pack())) for bits in (1, 3, 4)),
    Case(name="hadamard-lloyd", stages=(Hadamard(seed=0), LloydMax(bits=4), Pack())),
    Case(
        name="hadamard-signs-token",
        stages=(Hadamard(seed=7), TokenMinMax(levels=16, group=0), Pack()),
    ),
    Case(
        name="centre-hadamard-lloyd",
        stages=(Centre(), Hadamard(seed=1), LloydMax(bits=3), Pack()),
    ),
    Case(
        name="hadamard-step",
        stages=(Hadamard(seed=0), ConstantStep(relative_step=0.5), Rans(tables=4)),
    ),
    Case(
        name="predict",
        stages=(PredictLayer(sources=4), ConstantStep(relative_step=0.5), Rans(tables=4)),
    ),
    Case(
        name="centre-predict",
        stages=(
            Lead(tokens=1),
            Centre(),
            PredictLayer(sources=1),
            ConstantStep(relative_step=0.1),
            Rans(tables=1),
        ),
    ),
    Case(name="token-ladder", stages=(TokenMinMax(levels=16, group=0), Ladder())),
    Case(name="step-ladder", stages=(Centre(), ConstantStep(relative_step=0.5), Ladder())),
    Case(name="channel-rans", stages=(ChannelMinMax(levels=12, group=0), Rans(tables=16))),
    Case(name="step", stages=(ConstantStep(relative_step=0.3), Rans(tables=16))),
    Case(name="fine-step", stages=(ConstantStep(relative_step=0.004), Rans(tables=2))),
    Case(name="centre", stages=(Centre(), ConstantStep(relative_step=0.5), Rans(tables=16))),
    Case(name="centre-token", stages=(Centre(), TokenMinMax(levels=16, group=0), Pack())),
    Case(name="scale", stages=(Scale(), ConstantStep(relative_step=0.5), Rans(tables=16))),
    Case(
        name="lead-centre-scale",
        stages=(Lead(tokens=1), Centre(), Scale(), ConstantStep(relative_step=0.4), Rans(tables=3)),
    ),
)
PLAIN_PRESETS: Final[dict[str, StrategyConfig]] = {
    name: config for name, config in PRESETS.items() if not Pipeline.of(config).calibrated
}
"""Presets that work without a bundle."""
CONFIGS: Final[dict[str, StrategyConfig]] = PLAIN_PRESETS | {
    f"stage:{case.name}": case.config for case in STAGE_CASES
}


def _groups(x: Real, group: int, axis: int) -> list[Real]:
    size = group or x.shape[axis]
    return [
        np.take(x, range(start, min(start + size, x.shape[axis])), axis)
        for start in range(0, x.shape[axis], size)
    ]


def _minmax(x: Real, levels: int, group: int, axis: int) -> Real:
    """Return half a step of each value's group."""
    parts = _groups(x, group, axis)
    halves = []
    for part in parts:
        low, high = part.min(axis, keepdims=True), part.max(axis, keepdims=True)
        slack = 1e-33 + FLOAT32 * np.maximum(np.abs(low), np.abs(high))
        half = (high - low) / (levels - 1) / 2 * (1 + 1e-4) + slack
        halves.append(np.broadcast_to(half, part.shape))
    return np.concatenate(halves, axis)


def _fp8(x: Real) -> Real:
    """Return a sixteenth of the value, or half the least step of its scaled row."""
    peak = np.abs(x).max(-1, keepdims=True)
    least = peak / 448 * 2.0**-10 + 1e-33
    bound: Real = np.maximum(np.abs(x) / 16, least) * (1 + 1e-4)
    return bound


def _step(x: Real, relative: float) -> Real:
    """Return half of each layer's step."""
    rms = np.sqrt((x**2).mean((1, 2, 3), keepdims=True))
    half = np.broadcast_to(relative * rms / 2 * (1 + 1e-3), x.shape)
    # a step below 2**-120 becomes 0
    bound: Real = half + FLOAT32 * np.abs(x) + np.where(relative * rms < 2.0**-119, np.abs(x), 0)
    return bound


def _absmax(x: Real, bins: int, scope: str) -> Real:
    """Return half a step of each value's token, or of its token's head."""
    peak = np.abs(x).max((2, 3) if scope == "token" else 3, keepdims=True)
    half = peak / (bins // 2 - 1) / 2 * (1 + 1e-4) + FLOAT32 * peak + 1e-33
    return np.broadcast_to(half, x.shape)


def _lloyd(x: Real, bits: int, dtype: torch.dtype) -> Real:
    """Return each value's distance from the nearest level of its token's head, and what rounding the scale may cost."""
    rms = np.sqrt((x**2).mean(-1, keepdims=True))
    levels = centroids(bits).astype(np.float64)
    distance = np.abs(x[..., None] - rms[..., None] * levels).min(-1)
    relative, least = ROUNDING[dtype]
    reach = np.abs(x) + levels[-1] * rms
    bound: Real = (
        distance + 2 * (relative + FLOAT32) * reach + 2 * math.sqrt(x.shape[-1]) * (least + 1e-33)
    )
    return bound


def _of_quantiser(stage: Stage, x: Real, dtype: torch.dtype) -> Real:
    match stage:
        case TokenMinMax():
            return _minmax(x, stage.levels, stage.group, 3)
        case ChannelMinMax():
            return _minmax(x, stage.levels, stage.group, 1)
        case Fp8():
            return _fp8(x)
        case AbsMax():
            return _absmax(x, stage.bins, stage.scope)
        case LloydMax():
            return _lloyd(x, stage.bits, dtype)
        case ConstantStep():
            return _step(x, stage.relative_step)
    raise AssertionError(f"{stage.id} has no error bound: add one here")


def rotated(x: Real, seed: int) -> Real:
    """Return the definition of ``transform.hadamard.v1`` in float64: blocks of Sylvester matrices, after the signs."""
    size = hadamard.block_size(x.shape[-1])
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = (x * signs(seed, x.shape[-1])).reshape(*x.shape[:-1], -1, size)
    turned: Real = (blocks @ matrix / math.sqrt(size)).reshape(x.shape)
    return turned


def _of_chain(stages: tuple[Stage, ...], x: Real, dtype: torch.dtype) -> Real:
    """Return the most that each value may be wrong by, for a chain that starts with ``stages``."""
    if all(stage.lossless for stage in stages):
        return np.zeros_like(x)
    stage, rest = stages[0], stages[1:]
    match stage:
        case Lead():
            taken = min(stage.tokens, x.shape[1] - 1)
            exact = np.zeros_like(x[:, :taken])
            return np.concatenate([exact, _of_chain(rest, x[:, taken:], dtype)], axis=1)
        case Centre():
            mean = x.mean(1, keepdims=True)
            # the mean itself is rounded, which moves what the next stage sees
            relative, least = ROUNDING[dtype]
            moved = 2 * relative * np.abs(mean) + least
            inner = _of_chain(rest, x - mean, dtype)
            widened = _of_chain(rest, np.abs(x - mean) + moved, dtype)
            bound: Real = np.maximum(inner, widened) + FLOAT32 * (np.abs(x) + np.abs(mean)) + moved
            return bound
        case Scale():
            square = (x**2).mean(-1, keepdims=True)
            exponent = np.floor(np.log2(np.maximum(square, 2.0**-127)))
            factor = np.sqrt(2.0**exponent)
            # on the edge of a power of two the divisor may be the next one
            scaled: Real = 1.5 * factor * _of_chain(rest, x / factor, dtype)
            return scaled + FLOAT32 * np.abs(x)
        case PredictLayer():
            # the step is relative to what prediction leaves, which it never makes larger; before each layer's values
            # come products of the layer before, rounded one by one
            largest = np.sqrt((x**2).sum((1, 2, 3), keepdims=True)).max()
            left: Real = _of_chain(rest, x, dtype) + 16 * FLOAT32 * stage.sources * largest
            return left
        case Hadamard():
            # a rotation keeps lengths: no value is wrong by more than its head's error is long
            inner = _of_chain(rest, rotated(x, stage.seed), dtype)
            length = np.sqrt((inner**2).sum(-1, keepdims=True)) * (1 + 1e-5)
            slack = (
                4 * FLOAT32 * np.sqrt((x**2).sum(-1, keepdims=True)) * math.log2(2 * x.shape[-1])
            )
            spread: Real = np.broadcast_to(length + slack, x.shape)
            return spread
    return _of_quantiser(stage, x, dtype)


def error_bound(config: StrategyConfig, kind: Kind, x: torch.Tensor) -> Real:
    """Return the most that each decoded value may differ from ``x``, by the stages' own definitions.

    Joint parts are bounded like parts of one kind: stages without calibration treat each layer by itself.
    """
    bound = np.empty(tuple(x.shape))
    extent = Extent(
        layers=range(x.shape[0]),
        model_layers=x.shape[0],
        heads=x.shape[2],
        tokens=range(x.shape[1]),
    )
    for cells in cut(config.parts, extent):
        if kind in cells.kinds:
            stages = tuple(make_stage(s, "law") for s in config.parts[cells.part].chain)
            index = np.ix_(cells.layers, cells.tokens, cells.heads)
            bound[index] = _piece_bound(stages, x[index])
    return bound


def _piece_bound(stages: tuple[Stage, ...], x: torch.Tensor) -> Real:
    bound = _of_chain(stages, x.double().numpy(), x.dtype)
    if all(stage.lossless for stage in stages):
        return bound
    relative, least = ROUNDING[x.dtype]
    magnitude = np.abs(x.double().numpy()) + bound
    lead = stages[0].tokens if isinstance(stages[0], Lead) else 0
    rounded: Real = bound + relative * magnitude * (1 + 1e-6) + least
    rounded[:, : min(lead, x.shape[1] - 1)] = 0
    return rounded


def _gauss(rng: np.random.Generator, shape: tuple[int, ...]) -> Real:
    channels = 5 * rng.standard_normal((shape[0], 1, shape[2], shape[3]))
    return rng.standard_normal(shape) + channels


def _outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Real:
    x: Real = rng.standard_normal(shape) * rng.choice([1.0, 1.0, 1.0, 300.0], shape)
    return x


def _mixed(rng: np.random.Generator, shape: tuple[int, ...]) -> Real:
    x: Real = rng.standard_normal(shape) * rng.choice([0.0, -0.0, 1e-7, 1.0], shape)
    return x


def _one(rng: np.random.Generator, shape: tuple[int, ...]) -> Real:
    x = np.zeros(shape)
    x[tuple(int(rng.integers(0, size)) for size in shape)] = 7.0
    return x


KINDS: Final[dict[str, Callable[[np.random.Generator, tuple[int, ...]], Real]]] = {
    "gauss": _gauss,
    "zeros": lambda rng, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, rng.standard_normal()),
    "outliers": _outliers,
    "mixed": _mixed,
    "one": _one,
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-30,
    "large": lambda rng, shape: rng.standard_normal(shape) * 1e4,
    "cauchy": lambda rng, shape: np.clip(rng.standard_cauchy(shape), -6e4, 6e4),
}


def sample(kind: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return values of a kind, reproducible."""
    return torch.from_numpy(KINDS[kind](np.random.default_rng(seed), shape)).to(dtype)


def bits(x: torch.Tensor) -> NDArray[Any]:
    """Return the bit patterns of a tensor."""
    word = torch.int32 if x.dtype == torch.float32 else torch.int16
    array: NDArray[Any] = x.contiguous().view(word).numpy()
    return array


def check_round_trip(config: StrategyConfig, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Encode and decode; check errors, sizes, finiteness, determinism."""
    pipeline = Pipeline.of(config)
    payload = pipeline.encode(keys, values)
    layers, tokens, kv_heads, head_dim = keys.shape
    bound = pipeline.max_encoded_nbytes(
        layers=layers, tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, dtype=keys.dtype
    )
    assert len(payload) <= bound
    assert len(payload) == bound or not pipeline.fixed_size
    assert pipeline.encode(keys, values) == payload

    shape = (layers, tokens, kv_heads, head_dim)
    decoded = pipeline.decode(payload, shape=shape, dtype=keys.dtype)
    for kind, native, restored in zip(Kind, (keys, values), decoded, strict=True):
        assert restored.dtype == native.dtype
        assert restored.shape == native.shape
        if pipeline.lossless:
            np.testing.assert_array_equal(bits(restored), bits(native))
            continue
        assert restored.isfinite().all()
        error = np.abs(restored.double().numpy() - native.double().numpy())
        excess = error - error_bound(config, kind, native)
        assert excess.max() <= 0, f"{kind}: {excess.max()} over the bound"
