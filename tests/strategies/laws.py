"""The laws every strategy obeys, and what it takes to check them for each registered stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvserve_api.strategy import Kind, StrategyConfig
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.presets import strategy
from kvserve_strategies.registry import make_stage
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
CONFIGS: Final[dict[str, StrategyConfig]] = dict(PRESETS) | {
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


def _of_quantiser(stage: Stage, x: Real) -> Real:
    match stage:
        case TokenMinMax():
            return _minmax(x, stage.levels, stage.group, 3)
        case ChannelMinMax():
            return _minmax(x, stage.levels, stage.group, 1)
        case Fp8():
            return _fp8(x)
        case ConstantStep():
            return _step(x, stage.relative_step)
    raise AssertionError(f"{stage.id} has no error bound: add one here")


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
    return _of_quantiser(stage, x)


def error_bound(config: StrategyConfig, kind: Kind, x: torch.Tensor) -> Real:
    """Return the most that each decoded value may differ from ``x``, by the stages' own definitions."""
    stages = tuple(make_stage(stage, "law") for stage in config.part(kind).chain)
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
