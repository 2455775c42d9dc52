"""Every fast CPU path agrees with its definition, bit by bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_kernels import (
    blocks,
    checksum,
    finite,
    floats,
    fp8,
    minmax,
    pack,
    rans,
    scale,
    step,
    tiles,
    transpose,
)
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.checksum import checksum_ref
from kvserve_kernels.finite import finite_ref
from kvserve_kernels.floats import floats_ref
from kvserve_kernels.fp8 import fp8_ref
from kvserve_kernels.minmax import minmax_ref
from kvserve_kernels.pack import pack_ref
from kvserve_kernels.rans import rans_ref
from kvserve_kernels.scale import scale_ref
from kvserve_kernels.step import step_ref

SEEDS = st.integers(0, 2**32 - 1)
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bfloat16", "float32"])


def sample(seed: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return values with outliers, zeros and tiny numbers among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    values *= rng.choice(np.array([1, 1, 1, 0, 1e-36, 100, 3e4], np.float32), shape)
    return narrow(values, dtype)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param(b"", 0xEF46DB3751D8E999, id="empty"),
        pytest.param(b"abc", 0x44BC2CF5AD770999, id="abc"),
    ],
)
def test_checksum_known_values(text: bytes, value: int) -> None:
    """The checksum is XXH64 by its published values."""
    assert checksum.checksum(np.frombuffer(text, np.uint8)) == value
    assert checksum_ref.checksum(text) == value


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), offset=st.integers(0, 7))
def test_checksum(data: bytes, offset: int) -> None:
    """The checksum does not depend on where in memory the bytes lie."""
    whole = np.frombuffer(bytes(offset) + data, np.uint8)
    assert checksum.checksum(whole[offset:]) == checksum_ref.checksum(data)


def test_checksum_sees_every_bit() -> None:
    """Whichever single bit flips, the checksum changes."""
    data = np.random.default_rng(0).integers(0, 256, 777, dtype=np.uint8)
    before = checksum.checksum(data)
    for at in range(data.size):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert checksum.checksum(data) != before
            data[at] ^= 1 << bit


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_finite(dtype: str, bad: float) -> None:
    """A single value that is not finite is found, wherever it is; the largest finite ones are not."""
    for at in (None, 0, 4095, 4096, 8999):
        wide = np.full(9000, 65504 if dtype == "float16" else 3e38, np.float32)
        if at is not None:
            wide[at] = bad
        array: NDArray[Any] = (
            (wide.view(np.uint32) >> 16).astype(np.uint16)
            if dtype == "bfloat16"
            else wide.astype(dtype)
        )
        assert finite.all_finite(array, dtype) == (at is None)
        assert finite_ref.all_finite(array, dtype) == (at is None)


@TYPES
@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    rows=st.integers(1, 9),
    dim=st.integers(1, 130),
    group=st.integers(1, 130),
    levels=st.integers(2, 256),
)
def test_minmax_rows(dtype: Any, seed: int, rows: int, dim: int, group: int, levels: int) -> None:
    """Rows are quantised and restored as defined."""
    x = sample(seed, (rows, dim), dtype)
    group = min(group, dim)
    expected = minmax_ref.encode(x, group=group, levels=levels)
    actual = minmax.encode_rows(x, group=group, levels=levels)
    assert expected is not None
    assert actual is not None
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        minmax.decode_rows(*actual, group=group, levels=levels),
        minmax_ref.decode(*expected, group=group, levels=levels),
    )


@TYPES
@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    group=st.integers(1, 80),
    levels=st.integers(2, 256),
)
def test_minmax_columns(
    dtype: Any, seed: int, shape: tuple[int, int, int], group: int, levels: int
) -> None:
    """Columns are quantised and restored as defined."""
    x = sample(seed, shape, dtype)
    group = min(group, shape[1])
    expected = minmax_ref.encode(x, group=group, levels=levels)
    actual = minmax.encode_columns(x, group=group, levels=levels)
    assert expected is not None
    assert actual is not None
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        minmax.decode_columns(*actual, group=group, levels=levels),
        minmax_ref.decode(*expected, group=group, levels=levels),
    )


def test_minmax_refuses_a_span_beyond_float32() -> None:
    """A group from -3e38 to 3e38 has no float32 span and is refused, by rows and by columns."""
    x = np.array([[-3e38, 3e38, 0.0]], np.float32)
    assert minmax.encode_rows(x, group=3, levels=4) is None
    assert minmax.encode_columns(x.reshape(1, 3, 1), group=3, levels=4) is None


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 100), width=st.integers(1, 8))
def test_pack(seed: int, count: int, width: int) -> None:
    """Codes are packed bit by bit as defined, and come back."""
    codes = np.random.default_rng(seed).integers(0, 1 << width, count, dtype=np.uint8)
    packed = pack.pack(codes, width)
    np.testing.assert_array_equal(packed, pack_ref.pack(codes, width))
    assert packed.size == pack.packed_nbytes(count, width)
    np.testing.assert_array_equal(pack.unpack(packed, count, width), codes)
    np.testing.assert_array_equal(pack_ref.unpack(packed, count, width), codes)


@TYPES
@pytest.mark.parametrize("scaled", [False, True])
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 5), dim=st.integers(1, 130))
def test_fp8(dtype: Any, scaled: bool, seed: int, rows: int, dim: int) -> None:
    """Values become the nearest e4m3 number, and codes the number they stand for."""
    x = sample(seed, (rows, dim), dtype)
    codes, peaks = fp8.encode(x, scaled=scaled)
    expected_codes, expected_peaks = fp8_ref.encode(x, scaled=scaled)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(peaks, expected_peaks)
    np.testing.assert_array_equal(
        fp8.decode(codes, peaks, scaled=scaled), fp8_ref.decode(codes, peaks, scaled=scaled)
    )


def test_fp8_numbers_return() -> None:
    """Every e4m3 number is its own nearest number."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8).reshape(1, -1)
    numbers = fp8.decode(codes, np.empty(0, np.float32), scaled=False)
    np.testing.assert_array_equal(fp8.encode(numbers, scaled=False)[0], codes)


@TYPES
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)))
def test_step(dtype: Any, seed: int, shape: tuple[int, int, int]) -> None:
    """Centring, steps and multiples are as defined, and so is the way back."""
    x = sample(seed, shape, dtype)
    made, expected = step.centre(x), step_ref.centre(x)
    assert made is not None
    assert expected is not None
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(step.uncentre(*made), step_ref.uncentre(*made))
    for value in (x, made[0]):
        steps = step.relative_steps(value, 0.3)
        np.testing.assert_array_equal(steps, step_ref.relative_steps(value, 0.3))
        codes, wanted = step.quantise(value, steps), step_ref.quantise(value, steps)
        assert codes is not None
        assert wanted is not None
        np.testing.assert_array_equal(codes, wanted)
        np.testing.assert_array_equal(
            step.dequantise(codes, steps, dtype), step_ref.dequantise(codes, steps, dtype)
        )


def test_step_refuses_what_int16_cannot_hold() -> None:
    """A value of more than 32,767 steps is refused."""
    x = np.array([[[32_767.0], [-32_767.0]]], np.float32)
    assert step.quantise(x, np.ones(1, np.float32)) is not None
    assert step.quantise(x * np.float32(1.001), np.ones(1, np.float32)) is None
    for last, fits in ((32_767.49, True), (32_767.5, False)):
        x = np.full((1, 1, 1), last, np.float32)
        for quantise in (step.quantise, step_ref.quantise):
            assert (quantise(x, np.ones(1, np.float32)) is not None) == fits


@TYPES
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 9), dim=st.integers(1, 130))
def test_scale(dtype: Any, seed: int, rows: int, dim: int) -> None:
    """Rows are scaled to a mean square of 1 to 2 as defined, and so is the way back."""
    x = sample(seed, (rows, dim), dtype)
    made, expected = scale.scale(x), scale_ref.scale(x)
    assert made is not None
    assert expected is not None
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    squares = (made[0].astype(np.float64) ** 2).mean(axis=1)
    assert ((squares < 2.0001) & ((squares > 0.9999) | (made[1] == 0))).all()
    np.testing.assert_array_equal(scale.unscale(*made, dtype), scale_ref.unscale(*made, dtype))


def test_scale_refuses_squares_beyond_float32() -> None:
    """A row of 1e20 has no float32 mean square and is refused."""
    assert scale.scale(np.full((1, 3), 1e20, np.float32)) is None


@pytest.mark.parametrize(
    ("word", "mantissa"),
    [
        pytest.param(np.uint16, 7, id="bfloat16"),
        pytest.param(np.uint16, 10, id="float16"),
        pytest.param(np.uint32, 23, id="float32"),
    ],
)
def test_floats(word: Any, mantissa: int) -> None:
    """Every kind of bit pattern is split as defined and joined again."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, np.iinfo(word).max, 5000, dtype=word, endpoint=True)
    exponents, rest = floats.split(words, mantissa)
    expected = floats_ref.split(words, mantissa)
    np.testing.assert_array_equal(exponents, expected[0])
    np.testing.assert_array_equal(rest, expected[1])
    np.testing.assert_array_equal(floats.join(exponents, rest, mantissa, word), words)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)))
def test_transpose(seed: int, shape: tuple[int, int, int]) -> None:
    """The last two dimensions are swapped."""
    x = np.random.default_rng(seed).integers(-99, 99, shape, dtype=np.int16)
    np.testing.assert_array_equal(transpose.transpose(x, np.int16), x.swapaxes(1, 2))


def random_tables(rng: np.random.Generator, count: int) -> NDArray[np.uint32]:
    """Return frequencies ``[count, 32]`` of sum 4096, some symbols at 0, one table of a single symbol."""
    tables = np.zeros((count, 32), np.uint32)
    tables[0, 3] = 4096
    for row in tables[1:]:
        used = rng.integers(2, 33)
        cuts = np.sort(rng.choice(np.arange(1, 4096), used - 1, replace=False))
        row[:used] = np.diff(np.concatenate([[0], cuts, [4096]]))
    return tables


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    channels=st.integers(1, 20),
    total=st.integers(1, 100),
    start=st.integers(0, 60),
    count=st.integers(1, 5),
)
def test_rans(seed: int, channels: int, total: int, start: int, count: int) -> None:
    """States and words are as defined, and both decoders give the symbols back."""
    rng = np.random.default_rng(seed)
    tokens = range(min(start, total - 1), total)
    frequencies = random_tables(rng, count)
    tables = rng.integers(0, count, channels).astype(np.uint8)
    symbols = np.stack(
        [rng.choice(32, total, p=frequencies[t] / 4096).astype(np.uint8) for t in tables]
    )
    states, words = rans.encode(symbols, tokens, tables, frequencies)
    for a, b in zip(
        (states, words), rans_ref.encode(symbols, tokens, tables, frequencies), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    fast, defined = np.zeros_like(symbols), np.zeros_like(symbols)
    assert rans.decode(words, states, tables, rans.slot_tables(frequencies), fast, tokens)
    rans_ref.decode(words, states, tables, frequencies, defined, tokens)
    for out in (fast, defined):
        np.testing.assert_array_equal(out[:, tokens.start :], symbols[:, tokens.start :])
        assert not out[:, : tokens.start].any()


def test_rans_notices_a_wrong_end() -> None:
    """Words cut off, added or altered leave a state or a count that no encoder leaves."""
    rng = np.random.default_rng(2)
    frequencies = random_tables(rng, 4)
    tables = np.full(8, 2, np.uint8)
    symbols = rng.choice(32, (8, 64), p=frequencies[2] / 4096).astype(np.uint8)
    states, words = rans.encode(symbols, range(64), tables, frequencies)
    slots, out = rans.slot_tables(frequencies), np.empty_like(symbols)
    altered = words.copy()
    altered[-1] ^= 1
    for bad in (words[:-1], np.append(words, np.uint16(0)), altered, words[:0]):
        assert not rans.decode(bad, states, tables, slots, out, range(64))


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    channels=st.integers(1, 12),
    tokens=st.integers(1, 90),
    scale=st.sampled_from([0, 1, 3, 40, 900, 20_000]),
)
def test_symbols(seed: int, channels: int, tokens: int, scale: int) -> None:
    """Any integers become symbols, planes and escapes from which they come back, whatever the models."""
    rng = np.random.default_rng(seed)
    values = np.clip(rng.standard_t(2, (channels, tokens)) * scale, -32768, 32767).astype(np.int16)
    tables = rng.integers(0, 2, channels).astype(np.uint8)
    tables[0] = 0
    models = rans.build(values, tables)
    for model in models:
        assert sum(model.frequencies) == rans.TOTAL
        assert min(model.frequencies) >= 0
        assert 1 <= len(model.frequencies) <= rans.MAX_SYMBOLS
    symbols, planes, escapes = rans.split(values, tables, models)
    assert all(
        models[t].frequencies[s] > 0 for t, row in zip(tables, symbols, strict=True) for s in row
    )
    restored = rans.merge(symbols, tables, models, planes, escapes)
    assert restored is not None
    np.testing.assert_array_equal(restored, values)


def test_models_come_close_to_the_entropy() -> None:
    """Coding a discrete Gaussian takes at most 2 % more than its entropy, at any width."""
    rng = np.random.default_rng(3)
    for width in (0.3, 1.0, 3.0, 10.0, 100.0):
        values = np.rint(rng.standard_normal((64, 2048)) * width).astype(np.int16)
        tables = rans.assign(values, 16)
        models = rans.build(values, tables)
        symbols, planes, escapes = rans.split(values, tables, models)
        frequencies = np.zeros((len(models), 32), np.uint32)
        for row, model in zip(frequencies, models, strict=True):
            row[: len(model.frequencies)] = model.frequencies
        states, words = rans.encode(symbols, range(2048), tables, frequencies)
        bits = 8 * (states.nbytes + words.nbytes + planes.nbytes + escapes.nbytes) / values.size
        counts = np.unique(values, return_counts=True)[1] / values.size
        entropy = float(-(counts * np.log2(counts)).sum())
        assert entropy - 0.05 < bits < 1.02 * entropy + 0.01


@pytest.mark.parametrize("level", ["", "numba"])
@pytest.mark.parametrize("of_tokens", [False, True], ids=["dimensions", "tokens"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("inner", "groups", "columns", "order"),
    [
        pytest.param(16, 32, 1, (0, 1, 2, 4, 3, 5), id="columns"),
        pytest.param(1, 4, 16, (0, 1, 4, 2, 3, 5), id="rows"),
        pytest.param(6, 1, 7, (0, 1, 2, 5, 4, 3), id="odd"),
        pytest.param(5, 3, 2, (1, 3, 5, 0, 4, 2), id="any"),
    ],
)
def test_tiles(
    level: str,
    of_tokens: bool,
    size: int,
    inner: int,
    groups: int,
    columns: int,
    order: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every pair lies where the strides say, in the blocks named, nothing else changes, and all of it comes back."""
    monkeypatch.setenv("KVSERVE_SIMD", level)
    shape = (4, 2, 2, inner, groups, columns)
    pair, word = np.dtype(f"u{2 * size}"), np.dtype(f"u{size}")
    memory = np.zeros([shape[axis] for axis in order], pair)
    target = memory.transpose([order.index(axis) for axis in range(6)])
    dice = np.random.default_rng(size)
    tokens, dim = (
        2 * 2 * inner * (2 if of_tokens else 1),
        groups * columns * (1 if of_tokens else 2),
    )
    rows = dice.integers(1, np.iinfo(word).max, (tokens, 2, dim), word)
    blocks = np.array([3, 1])
    tiles.put(rows, blocks, target, of_tokens=of_tokens)
    expected = np.zeros(shape, pair)
    for at in np.ndindex(2, 2, 2, inner, groups, columns):
        block, head, outer, within, group, column = at
        row, place = (block * 2 + outer) * inner + within, group * columns + column
        if of_tokens:
            low, high = rows[2 * row, head, place], rows[2 * row + 1, head, place]
        else:
            low, high = rows[row, head, 2 * place], rows[row, head, 2 * place + 1]
        expected[(blocks[block], *at[1:])] = int(low) | int(high) << 8 * size
    assert np.array_equal(target, expected)
    back = np.zeros_like(rows)
    tiles.take(back, blocks, target, of_tokens=of_tokens)
    assert np.array_equal(back, rows)
    assert np.array_equal(target, expected)
    for copy in (tiles.put, tiles.take):
        with pytest.raises(IndexError):
            copy(rows, np.array([3, 4]), target, of_tokens=of_tokens)
        with pytest.raises(ValueError, match="do not fill"):
            copy(rows[1:], blocks, target, of_tokens=of_tokens)


@pytest.mark.parametrize("level", ["", "numba"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param((0, 1, 2, 3), id="rows"),
        pytest.param((0, 1, 3, 2), id="columns"),
        pytest.param((2, 3, 0, 1), id="any"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "first", "count"),
    [
        pytest.param(32, 2, 16, 0, 96, id="whole"),
        pytest.param(41, 3, 19, 5, 83, id="odd"),
        pytest.param(16, 1, 8, 15, 2, id="edge"),
        pytest.param(16, 1, 8, 3, 0, id="none"),
    ],
)
def test_blocks(
    level: str,
    size: int,
    order: tuple[int, ...],
    tokens: int,
    heads: int,
    dim: int,
    first: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token lies in the block and place that follow from the first, nothing else changes, and all comes back."""
    monkeypatch.setenv("KVSERVE_SIMD", level)
    shape, word = (6, heads, tokens, dim), np.dtype(f"u{size}")
    memory = np.zeros([shape[axis] for axis in order], word)
    cache = memory.transpose([order.index(axis) for axis in range(4)])
    dice = np.random.default_rng(size)
    rows = dice.integers(1, np.iinfo(word).max, (count, heads, dim), word)
    ids = np.array([4, 1, 5])
    blocks.put(rows, ids, cache, first=first)
    expected = np.zeros(shape, word)
    for row in range(count):
        expected[ids[(first + row) // tokens], :, (first + row) % tokens] = rows[row]
    assert np.array_equal(cache, expected)
    back = np.zeros_like(rows)
    blocks.take(back, ids, cache, first=first)
    assert np.array_equal(back, rows)
    assert np.array_equal(cache, expected)
    more = np.zeros((3 * tokens - first + 1, heads, dim), word)
    for copy in (blocks.put, blocks.take):
        with pytest.raises(IndexError):
            copy(rows, np.array([4, 1, 6]), cache, first=first)
        for wrong, start in ((more, first), (rows, -1), (rows[..., 1:], first)):
            with pytest.raises(ValueError, match="do not fit"):
                copy(wrong, ids, cache, first=start)
