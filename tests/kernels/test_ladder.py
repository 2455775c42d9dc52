"""The ladder: its numbers never change, its choice is as defined, and what it codes comes close to the entropy."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_kernels import ladder, rans
from kvserve_kernels.ladder import ladder_ref, make_tables
from kvserve_kernels.ladder.bins import shift_of
from kvserve_kernels.ladder.tables import FILE, prices
from kvserve_kernels.native import Simd, coder

DIGEST = "3ab54e5adcae67f1909774247e849671ffb9b7fbe8fbff03e7bd6b85b73a94d9"


def levels() -> list[str]:
    """Return who can do the work on this machine."""
    library = coder()
    widest = -1 if library is None else library.kvserve_widest()
    return [level.name.lower() for level in Simd if level <= widest]


@pytest.fixture(autouse=True)
def clean_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without a choice of who does the work."""
    monkeypatch.setenv("KVSERVE_SIMD", "")


def gaussian(rng: np.random.Generator, shape: float, size: tuple[int, ...]) -> NDArray[np.float64]:
    """Return generalised Gaussian numbers of standard deviation 1."""
    width = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    magnitudes = width * rng.gamma(1 / shape, 1, size) ** (1 / shape)
    return np.asarray(magnitudes * rng.choice([-1, 1], size), np.float64)


def test_numbers_never_change() -> None:
    """The file of tables is one byte format for ever."""
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == DIGEST


def test_numbers_come_from_the_script() -> None:
    """The script gives the file, byte by byte."""
    assert make_tables.text() == FILE.read_text()


def test_tables_are_well_formed() -> None:
    """Table 0 is that of zeros; all others carry every int16, escaping what is far out, and are symmetric."""
    first, *others = ladder.tables().models
    assert first == rans.Model(base=0, low_bits=0, escape=False, frequencies=(4096,))
    assert 50 < len(others) < 255
    for model in others:
        assert model.escape
        assert sum(model.frequencies) == 4096
        assert min(model.frequencies) >= 1
        assert 3 <= len(model.frequencies) <= 32
        middle = model.base + model.span / 2
        assert abs(middle) <= 0.5
        # distances modulo 2**16 must not bring far values back inside
        assert model.base + 32768 + model.span <= 65536
    rates = [
        sum(f / 4096 * math.log2(4096 / f) for f in model.frequencies) + model.low_bits
        for model in others
    ]
    assert rates[0] < 0.03
    assert rates[-1] > 10


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 12),
    tokens=st.integers(1, 300),
    spread=st.sampled_from([0.1, 1, 6, 200, 20_000]),
)
def test_choice_is_as_defined(
    monkeypatch: pytest.MonkeyPatch, seed: int, channels: int, tokens: int, spread: float
) -> None:
    """Whoever does the work chooses the same tables, and codes to the same bytes."""
    rng = np.random.default_rng(seed)
    wide = rng.laplace(size=(channels, tokens)) * spread * rng.random((channels, 1)) ** 3
    values = np.rint(wide).clip(-32768, 32767).astype(np.int16)
    values[rng.integers(0, channels), rng.integers(0, tokens)] = rng.choice([0, 127, 128, -32768])
    expected = ladder_ref.choose(values, prices().tolist())
    made = set()
    for name in levels():
        monkeypatch.setenv("KVSERVE_SIMD", name)
        assert ladder.choose(values).tolist() == expected, name
        live = ladder.live(values)
        assert live.tolist() == [number > 0 for number in expected]
        ids, coded = ladder.encode(values, live, 3)
        assert ids.tolist() == expected
        arrays: list[NDArray[Any]] = [*coded.states, coded.planes, *coded.words, coded.escapes]
        made.add(b"|".join(array.tobytes() for array in arrays))
        decoded = rans.decode_values(coded, ids, ladder.tables(), 3, tokens)
        np.testing.assert_array_equal(decoded, values)
    assert len(made) == 1


@pytest.mark.parametrize("tokens", [32_767, 32_768, 65_534, 65_535, 131_100])
def test_choice_for_many_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts beyond 15 bits are shortened the same way by all."""
    rng = np.random.default_rng(tokens)
    values = np.rint(rng.laplace(size=(3, tokens)) * [[0.2], [3], [90]]).astype(np.int16)
    assert -(-tokens >> shift_of(tokens)) <= 32_767
    chosen = set()
    for name in levels():
        monkeypatch.setenv("KVSERVE_SIMD", name)
        chosen.add(tuple(ladder.choose(values).tolist()))
    assert len(chosen) == 1


@pytest.mark.parametrize("shape", [0.6, 0.8, 1.0, 1.6, 2.2])
def test_close_to_the_best_table(shape: float) -> None:
    """What is chosen costs at most 1 % more than the best of all tables, and 3 % more than the entropy."""
    rng = np.random.default_rng(int(10 * shape))
    spreads = 2.0 ** np.linspace(-1.5, 4, 40)[:, None]
    values = np.rint(gaussian(rng, shape, (40, 2048)) * spreads).clip(-32767, 32767)
    levels_ = values.astype(np.int16)
    ids = ladder.choose(levels_)
    costs = np.array([[cost(m, row) for m in ladder.tables().models[1:]] for row in levels_])
    chosen = costs[np.arange(40), ids.astype(int) - 1].sum()
    assert chosen <= 1.01 * costs.min(axis=1).sum()
    counts = [np.unique(row, return_counts=True)[1] / row.size for row in levels_]
    entropy = sum(float(-(p * np.log2(p)).sum()) for p in counts) * 2048
    # the entropy of a sample is below that of its source by about half a bit for each value that occurs
    bias = sum(p.size for p in counts) / 2 / math.log(2)
    assert chosen <= 1.03 * (entropy + bias)


def cost(model: rans.Model, row: NDArray[np.int16]) -> float:
    """Return the bits that a table takes for a channel."""
    distance = row.astype(np.int64) - model.base
    outside = (distance < 0) | (distance >= model.span)
    symbols = np.where(outside, len(model.frequencies) - 1, distance >> model.low_bits)
    lengths = np.log2(4096 / np.array(model.frequencies))[np.clip(symbols, 0, 31)]
    return float((lengths + 16 * outside + model.low_bits).sum())
