"""Every registered stage and every preset obeys the laws."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.calibrated import CALIBRATED_CONFIGS
from tests.strategies.laws import (
    CONFIGS,
    DTYPES,
    KINDS,
    STAGE_CASES,
    bits,
    check_round_trip,
    sample,
)

from kvserve_api.errors import ValuesError, WireError
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import Pipeline, Place
from kvserve_strategies.registry import STAGES, make_stage

ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
# where strategies that treat the layers at the ends differently are lossy
MIDDLE = Place(first_layer=2, model_layers=6)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16", "float32"])


def test_every_stage_is_covered() -> None:
    """A stage without a law-check case fails here."""
    covered = {stage.id for case in STAGE_CASES for stage in case.stages}
    for config in CALIBRATED_CONFIGS.values():
        covered |= {stage.id for part in config.parts for stage in part.chain}
    assert covered == set(STAGES)


@ALL
@settings(max_examples=8, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS))),
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 5, 8, 33])
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip(
    config: StrategyConfig,
    kinds: tuple[str, str],
    seed: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    """Values come back within the stages' error bound, sizes within theirs, and twice the same."""
    keys, values = (sample(kind, seed + i, shape, dtype) for i, kind in enumerate(kinds))
    check_round_trip(config, keys, values)


@ALL
@DTYPE
def test_one_value(config: StrategyConfig, dtype: torch.dtype) -> None:
    """A single value, whatever it is, is within the laws."""
    for number in (0.0, -0.0, 1.0, -3e-5, 6e4):
        x = torch.full((1, 1, 1, 1), number, dtype=dtype)
        check_round_trip(config, x, -x)


@ALL
@DTYPE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(config: StrategyConfig, dtype: torch.dtype, bad: float) -> None:
    """NaN and infinity are carried bit by bit by lossless strategies, and refused by all others."""
    pipeline = Pipeline.of(config)
    keys = sample("gauss", 1, (2, 40, 2, 8), dtype)
    values = keys.clone()
    values[1, 39, 1, 7] = bad
    for pair in ((keys, values), (values, keys)):
        if pipeline.lossless:
            payload = pipeline.encode(*pair, at=MIDDLE)
            decoded = pipeline.decode(payload, shape=(2, 40, 2, 8), dtype=dtype, at=MIDDLE)
            for native, restored in zip(pair, decoded, strict=True):
                np.testing.assert_array_equal(bits(restored), bits(native))
        else:
            with pytest.raises(ValuesError):
                pipeline.encode(*pair, at=MIDDLE)


@pytest.mark.parametrize("name", [name for name, c in CONFIGS.items() if Pipeline.of(c).lossless])
@DTYPE
def test_lossless_on_every_bit_pattern(name: str, dtype: torch.dtype) -> None:
    """All 65,536 words of 16 bits (and random ones of 32) come back from lossless strategies."""
    if dtype == torch.float32:
        words = np.random.default_rng(0).integers(-(2**31), 2**31 - 1, 2**16, dtype=np.int32)
    else:
        words = np.random.default_rng(0).permutation(2**16).astype(np.uint16).view(np.int16)
    keys = torch.from_numpy(words).view(dtype).reshape(2, 512, 1, 64)
    pipeline = Pipeline.of(CONFIGS[name])
    decoded = pipeline.decode(pipeline.encode(keys, keys), shape=(2, 512, 1, 64), dtype=dtype)
    for restored in decoded:
        np.testing.assert_array_equal(bits(restored), bits(keys))


@ALL
def test_extremes_are_refused_or_right(config: StrategyConfig) -> None:
    """Values near the ends of float32 are coded within the laws or refused, never turned into garbage."""
    for number in (3e38, 1e25, 1e-38, 1e-45):
        x = torch.tensor([number, -number, 0.0, number / 3]).reshape(1, 4, 1, 1).repeat(1, 3, 1, 5)
        try:
            Pipeline.of(config).encode(x, x)
        except ValuesError:
            assert number >= 1e19
            continue
        check_round_trip(config, x, x)


@ALL
def test_config_round_trip(config: StrategyConfig) -> None:
    """JSON gives back the same strategy and the same bytes; each stage gives back its own configuration."""
    again = StrategyConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.digest == config.digest
    x = sample("gauss", 2, (1, 20, 1, 8), torch.bfloat16)
    assert Pipeline(again).encode(x, x) == Pipeline(config).encode(x, x)
    for part in config.parts:
        for stage in part.chain:
            assert make_stage(stage, "stage").config == stage


@ALL
def test_memory_layout_does_not_matter(config: StrategyConfig) -> None:
    """Strided views give the same bytes as contiguous tensors."""
    x = sample("gauss", 3, (2, 3, 50, 8), torch.bfloat16).transpose(1, 2)
    pipeline = Pipeline.of(config)
    assert not x.is_contiguous()
    assert pipeline.encode(x, x) == pipeline.encode(x.contiguous(), x.contiguous())


@ALL
def test_threads(config: StrategyConfig) -> None:
    """Many threads at once get the bytes and values that one gets."""
    pipeline = Pipeline.of(config)
    shape = (2, 60, 2, 16)
    inputs = [sample("gauss", seed, shape, torch.bfloat16) for seed in range(8)]
    alone = [bytes(pipeline.encode(x, x)) for x in inputs]

    def work(x: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        payload = bytes(pipeline.encode(x, x))
        return payload, pipeline.decode(payload, shape=shape, dtype=x.dtype)[0]

    with ThreadPoolExecutor(4) as pool:
        for expected, (payload, restored) in zip(alone, pool.map(work, inputs), strict=True):
            assert payload == expected
            wanted = pipeline.decode(expected, shape=shape, dtype=torch.bfloat16)[0]
            np.testing.assert_array_equal(bits(restored), bits(wanted))


@ALL
def test_cut_and_padded_payloads(config: StrategyConfig) -> None:
    """A payload cut anywhere, or with bytes after it, is a typed error."""
    pipeline = Pipeline.of(config)
    shape = (1, 40, 1, 8)
    x = sample("gauss", 4, shape, torch.bfloat16)
    payload = bytes(pipeline.encode(x, x))
    for size in range(len(payload)):
        with pytest.raises(WireError):
            pipeline.decode(payload[:size], shape=shape, dtype=x.dtype)
    for extra in (bytes(1), bytes(8), b"\xff" * 64):
        with pytest.raises(WireError):
            pipeline.decode(payload + extra, shape=shape, dtype=x.dtype)


@ALL
@settings(max_examples=12, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    )
)
def test_hostile_payloads(config: StrategyConfig, edits: list[tuple[float, int]]) -> None:
    """Altered bytes that no checksum protects give a typed error or tensors of the right form, never a crash."""
    pipeline = Pipeline.of(config)
    shape = (1, 40, 1, 8)
    x = sample("gauss", 5, shape, torch.float32)
    payload = bytearray(pipeline.encode(x, x, at=MIDDLE))
    for where, byte in edits:
        payload[int(where * len(payload))] = byte
    try:
        keys, values = pipeline.decode(payload, shape=shape, dtype=x.dtype, at=MIDDLE)
    except WireError:
        return
    assert keys.shape == values.shape == shape
    assert pipeline.lossless or (keys.isfinite().all() and values.isfinite().all())
