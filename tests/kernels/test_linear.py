"""The linear transform: all implementations give the levels that the definition gives."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_kernels import linear, rotate
from kvserve_kernels.bits_ref import narrow, widen
from kvserve_kernels.linear import Group, Plan, linear_native, linear_ref, portable
from kvserve_kernels.linear.linear_native import Level

TYPES = pytest.mark.parametrize(
    "dtype", [np.uint16, np.float16, np.float32], ids=["bfloat16", "float16", "float32"]
)
LEVELS = [Level.NONE, *(level for level in Level if 0 < level <= linear_native.level())]
Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


def forward(
    level: Level, native: NDArray[Any], plan: Plan, tables: Tables, interleaved: bool = False
) -> NDArray[np.int16] | None:
    """Encode by one implementation."""
    if level == Level.NONE:
        return portable.forward(native, plan, *tables, interleaved)
    return linear_native.forward(native, plan, *tables, interleaved, level)


def inverse(
    level: Level,
    levels: NDArray[np.int16],
    plan: Plan,
    tables: Tables,
    out: NDArray[Any],
    interleaved: bool = False,
) -> None:
    """Decode by one implementation."""
    if level == Level.NONE:
        portable.inverse(levels, plan, *tables, interleaved, out)
    else:
        linear_native.inverse(levels, plan, *tables, interleaved, out, level)


def real(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return cache values as numbers."""
    wide = values if values.dtype == np.float16 else widen(values)
    return wide.astype(np.float64)


def cast(values: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Return numbers as cache values."""
    return values.astype(np.float16) if dtype == np.float16 else narrow(values, dtype)


def a_group(
    rng: np.random.Generator, slots: list[tuple[int, int, int]], dim: int, components: int
) -> Group:
    """Return a random group of slots (row, head, rotation)."""
    width = len(slots) * dim
    rows, heads, rotations = (np.array(column, np.int32) for column in zip(*slots, strict=True))
    return Group(
        rows=rows,
        heads=heads,
        rotations=rotations,
        mean=rng.standard_normal(width).astype(np.float32),
        inv_scale=(127 / (5 * rng.uniform(0.1, 3, width))).astype(np.float32),
        matrix=rng.integers(-127, 128, (components, width), dtype=np.int8),
        factor=(10.0 ** rng.uniform(-6, -1, components)).astype(np.float32),
        offset=rng.uniform(0.3, 0.5, components).astype(np.float32),
        delta=rng.uniform(-0.1, 0, components).astype(np.float32),
        inverse=(rng.standard_normal((components, width)) / width**0.5).astype(np.float32),
    )


def some_tables(tokens: int, pairs: int, count: int = 1) -> Tables:
    """Return rotation tables ``[count, tokens, pairs]``."""
    made = [
        rotate.tables((10_000.0 * (i + 1)) ** (-np.arange(pairs) / pairs), 1.0, 9 + i, tokens)
        for i in range(count)
    ]
    return np.stack([cos for cos, _ in made]), np.stack([sin for _, sin in made])


@pytest.mark.parametrize("level", LEVELS)
@TYPES
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 100),
    heads=st.integers(1, 3),
    dim=st.integers(2, 100) | st.sampled_from([32, 64, 128]),
    components=st.integers(0, 100),
    interleaved=st.booleans(),
    data=st.data(),
)
def test_linear(
    level: Level,
    dtype: Any,
    seed: int,
    tokens: int,
    heads: int,
    dim: int,
    components: int,
    interleaved: bool,
    data: st.DataObject,
) -> None:
    """Levels are as defined bit by bit, and so within rounding are the values that they stand for."""
    pairs = data.draw(st.integers(1, dim // 2) | st.just(dim // 2))
    rng = np.random.default_rng(seed)
    native = rng.standard_normal((4, tokens, heads, dim)).astype(np.float32)
    native *= rng.choice(np.array([1, 1, 1, 0, 1e-7, 100, 3e3], np.float32), native.shape)
    native = cast(native, dtype)
    tables = some_tables(tokens, pairs, 2)
    joined = [(row, head, -1 if row > 2 else row % 2) for row in (0, 1, 3) for head in range(heads)]
    plan = Plan(
        groups=(a_group(rng, [(2, 0, 1)], dim, 1), a_group(rng, joined, dim, components)), dim=dim
    )
    expected = linear_ref.forward(native, plan, *tables, interleaved)
    assert expected is not None
    levels = forward(level, native, plan, tables, interleaved)
    assert levels is not None
    np.testing.assert_array_equal(levels, expected)

    before = cast(np.full(native.shape, 7, np.float32), dtype)
    exact, out = before.copy(), before.copy()
    linear_ref.inverse(levels, plan, *tables, interleaved, exact)
    inverse(level, levels, plan, tables, out, interleaved)
    # float32 sums in another order, then a rounding that may fall to the other side
    bits = {np.dtype(np.uint16): 8, np.dtype(np.float16): 11, np.dtype(np.float32): 24}[out.dtype]
    sizes = np.abs(levels).max() * np.abs(plan.groups[1].inverse).max(initial=0) * (components + 1)
    slack = 2.0**-22 * (4 * float(sizes) + 9) + 2.0 ** (1 - bits) * np.abs(real(exact))
    assert (np.abs(real(out) - real(exact)) <= slack).all()
    # cells that are in no group stay
    np.testing.assert_array_equal(out[2, :, 1:], before[2, :, 1:])


@pytest.mark.parametrize("level", LEVELS)
@TYPES
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 70),
    dim=st.integers(2, 100) | st.sampled_from([32, 64, 128]),
    interleaved=st.booleans(),
    data=st.data(),
)
def test_finish(
    level: Level,
    dtype: Any,
    seed: int,
    tokens: int,
    dim: int,
    interleaved: bool,
    data: st.DataObject,
) -> None:
    """Where sums are exact, means, rotation and rounding give the defined values bit by bit."""
    pairs = data.draw(st.integers(1, dim // 2))
    rng = np.random.default_rng(seed)
    group = a_group(rng, [(0, 0, 0), (1, 1, -1)], dim, 2 * dim)
    scale = np.float32(2.0 ** data.draw(st.integers(-8, 9)))
    group = replace(
        group,
        delta=np.zeros(2 * dim, np.float32),
        inverse=np.eye(2 * dim, dtype=np.float32)[rng.permutation(2 * dim)] * scale,
    )
    plan = Plan(groups=(group,), dim=dim)
    levels = rng.integers(-256, 257, (2 * dim, tokens)).astype(np.int16)
    tables = some_tables(tokens, pairs)
    out, exact = (cast(np.zeros((2, tokens, 2, dim), np.float32), dtype) for _ in range(2))
    inverse(level, levels, plan, tables, out, interleaved)
    linear_ref.inverse(levels, plan, *tables, interleaved, exact)
    np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [64, 1024, 4160])
def test_products_are_exact(level: Level, width: int) -> None:
    """The largest products sum without saturation or rounding, of either sign."""
    tokens, dim = 33, width // 4
    slots = [(0, head, -1) for head in range(4)]
    rng = np.random.default_rng(2)
    group = a_group(rng, slots, dim, 34)
    matrix = rng.choice(np.array([-127, 127], np.int8), (34, width))
    matrix[:3] = [[127], [-127], [126]]
    group = replace(
        group,
        matrix=matrix,
        mean=np.zeros(width, np.float32),
        inv_scale=np.ones(width, np.float32),
        factor=np.full(34, 2.0**-12, np.float32),
    )
    native = rng.choice(np.array([-127, 127, 126], np.float32), (1, tokens, 4, dim))
    native[:, 0], native[:, 1] = 127, -127
    levels = forward(level, native, Plan(groups=(group,), dim=dim), some_tables(tokens, 1))
    x = native.transpose(1, 0, 2, 3).reshape(tokens, width).astype(np.int64)
    sums = matrix.astype(np.int64) @ x.T
    scaled = np.abs(sums).astype(np.float32) * group.factor[:, None] + group.offset[:, None]
    wanted = np.sign(sums) * np.minimum(np.floor(scaled), 32_767)
    assert np.abs(wanted).max() > 250
    np.testing.assert_array_equal(levels, wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_shifts(level: Level) -> None:
    """A token's shift is the least that makes it fit int8; what needs more than 31, or exceeds float32, is refused."""
    group = Group(
        rows=np.zeros(1, np.int32),
        heads=np.zeros(1, np.int32),
        rotations=np.zeros(1, np.int32),
        mean=np.zeros(2, np.float32),
        inv_scale=np.ones(2, np.float32),
        matrix=np.array([[1, 0]], np.int8),
        factor=np.ones(1, np.float32),
        offset=np.full(1, 0.5, np.float32),
        delta=np.zeros(1, np.float32),
        inverse=np.ones((1, 2), np.float32),
    )
    plan = Plan(groups=(group,), dim=2)
    cases = {
        127.0: 127,
        -126.5: -126,
        127.4: 128,  # 63.7 rounds to 64, twice
        253.0: 252,
        -253.2: -254,
        254.0: 254,
        254.1: 256,
        30_000.0: 29_952,
        -3e9: -32_767,
        1e-38: 0,
        127 * 2.0**31: 32_767,
    }
    tables: Tables = (
        np.ones((1, len(cases), 1), np.float32),
        np.zeros((1, len(cases), 1), np.float32),
    )
    native = np.zeros((1, len(cases), 1, 2), np.float32)
    native[0, :, 0, 0] = list(cases)
    levels = forward(level, native, plan, tables)
    assert levels is not None
    assert dict(zip(cases, levels[0].tolist(), strict=True)) == cases
    np.testing.assert_array_equal(levels, linear_ref.forward(native, plan, *tables, False))
    for bad in (127.1 * 2.0**31, 1e30, -3.4e38):
        native[0, 5, 0, 1] = bad
        assert forward(level, native, plan, tables) is None
        assert linear_ref.forward(native, plan, *tables, False) is None
    # the sum of rotated parts, then the scale, overflows float32
    native[0, 5, 0] = 3e38
    turned: Tables = (np.full_like(tables[0], 0.8), np.full_like(tables[1], 0.8))
    assert forward(level, native, plan, turned) is None
    native[0, 5, 0] = 3e37
    steep = Plan(groups=(replace(group, inv_scale=np.full(2, 1e20, np.float32)),), dim=2)
    assert forward(level, native, steep, tables) is None


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_read_with_their_sign(level: Level) -> None:
    """A level is moved by delta towards 0, zero stays 0, and float16 is held at its largest number."""
    group = Group(
        rows=np.zeros(1, np.int32),
        heads=np.zeros(1, np.int32),
        rotations=np.full(1, -1, np.int32),
        mean=np.zeros(2, np.float32),
        inv_scale=np.ones(2, np.float32),
        matrix=np.zeros((1, 2), np.int8),
        factor=np.ones(1, np.float32),
        offset=np.full(1, 0.5, np.float32),
        delta=np.full(1, -0.25, np.float32),
        inverse=np.array([[1.0, -8.0]], np.float32),
    )
    plan = Plan(groups=(group,), dim=2)
    levels = np.array([[0, 1, -1, 5, 32_767, -32_768]], np.int16)
    tables: Tables = (np.empty((0, 6, 0), np.float32), np.empty((0, 6, 0), np.float32))
    out = np.empty((1, 6, 1, 2), np.float32)
    inverse(level, levels, plan, tables, out)
    wanted = np.array([0, 0.75, -0.75, 4.75, 32_768, -32_768], np.float32)
    np.testing.assert_array_equal(out[0, :, 0], np.stack([wanted, -8 * wanted], axis=1))
    half = np.empty(out.shape, np.float16)
    inverse(level, levels, plan, tables, half)
    assert half[0, 4:, 0].tolist() == [[32_768, -65_504], [-32_768, 65_504]]


@pytest.mark.parametrize("level", LEVELS)
def test_views_are_read_and_written_in_place(level: Level) -> None:
    """A piece may be part of a larger array, with its tokens in reverse, and read-only."""
    rng = np.random.default_rng(4)
    whole = narrow(rng.standard_normal((6, 40, 3, 16)).astype(np.float32), np.uint16)
    view = whole[::2, 38:1:-1, 1:]
    view.flags.writeable = False
    plan = Plan(groups=(a_group(rng, [(0, 0, 0), (2, 1, -1)], 16, 20),), dim=16)
    tables = some_tables(37, 8)
    levels = forward(level, view, plan, tables)
    assert levels is not None
    np.testing.assert_array_equal(levels, linear_ref.forward(view, plan, *tables, False))
    levels.flags.writeable = False
    out, wanted = np.zeros_like(whole), np.zeros((3, 37, 2, 16), np.uint16)
    inverse(level, levels, plan, tables, out[::2, 38:1:-1, 1:])
    inverse(level, levels, plan, tables, wanted)
    np.testing.assert_array_equal(out[::2, 38:1:-1, 1:], wanted)
    assert np.count_nonzero(out) == np.count_nonzero(wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_threads_do_not_disturb_each_other(level: Level) -> None:
    """Threads that share a plan get the same bytes as one alone."""
    rng = np.random.default_rng(5)
    groups = tuple(a_group(rng, [(0, h, 0), (1, h, -1)], 64, 70) for h in range(3))
    plan = Plan(groups=groups, dim=64)
    native = narrow(rng.standard_normal((2, 300, 3, 64)).astype(np.float32), np.uint16)
    tables = some_tables(300, 32)
    alone = forward(level, native, plan, tables)
    assert alone is not None
    values = np.empty_like(native)
    inverse(level, alone, plan, tables, values)
    results: list[Any] = []

    def work() -> None:
        for _ in range(5):
            made, out = forward(level, native, plan, tables), np.empty_like(native)
            inverse(level, alone, plan, tables, out)
            results.append((made, out))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for made, out in results:
        np.testing.assert_array_equal(made, alone)
        np.testing.assert_array_equal(out, values)


def test_a_matrix_and_its_inverse_give_the_values_back() -> None:
    """With an orthonormal matrix and a fine step, values return to within the rounding of int8 and the step."""
    rng = np.random.default_rng(6)
    tokens, width = 200, 128
    basis, _ = np.linalg.qr(rng.standard_normal((width, width)))
    native = rng.standard_normal((2, tokens, 1, 64)).astype(np.float32)
    peak = np.abs(basis).max(axis=1, keepdims=True)
    step = 0.05
    inv_scale = np.full(width, 127 / 5, np.float32)
    group = replace(
        a_group(rng, [(0, 0, 0), (1, 0, -1)], 64, width),
        mean=np.full(width, 0.3, np.float32),
        inv_scale=inv_scale,
        matrix=np.rint(basis * 127 / peak).astype(np.int8),
        factor=(peak[:, 0] / 127 / inv_scale[0] / step).astype(np.float32),
        offset=np.full(width, 0.5, np.float32),
        delta=np.zeros(width, np.float32),
        inverse=(basis * step).astype(np.float32),
    )
    plan, tables = Plan(groups=(group,), dim=64), some_tables(tokens, 32)
    levels = linear.forward(native, plan, *tables, False)
    assert levels is not None
    out = np.empty_like(native)
    linear.inverse(levels, plan, *tables, False, out)
    # uniform noise of the step and of int8, and the matrix's own rounding
    assert np.sqrt(np.mean((out - native) ** 2)) < 0.035


def test_what_does_not_fit_is_refused() -> None:
    """Plans that point outside, and arrays of other shapes, are errors before any kernel runs."""
    rng = np.random.default_rng(7)
    group = a_group(rng, [(1, 2, 0)], 8, 3)
    plan = Plan(groups=(group,), dim=8)
    cos, sin = some_tables(5, 4)
    native = np.zeros((2, 5, 3, 8), np.float32)
    assert linear.forward(native, plan, cos, sin, False) is not None
    for bad in (native[:1], native[:, :, :2], native[..., :7], native[:, :4], native.astype(float)):
        with pytest.raises(ValueError, match=r"fit|float64"):
            linear.forward(bad, plan, cos, sin, False)
    for bad_cos in (cos[:0], cos[:, :4], np.concatenate([cos, cos], axis=2)):
        with pytest.raises(ValueError, match="fit"):
            linear.forward(native, plan, bad_cos, bad_cos, False)
    with pytest.raises(ValueError, match="levels must be"):
        linear.inverse(np.zeros((2, 5), np.int16), plan, cos, sin, False, native)
    with pytest.raises(ValueError, match="must hold 7"):
        Plan(groups=(group,), dim=7)
    for change in (
        {"inv_scale": np.zeros(8, np.float32)},
        {"mean": np.full(8, np.nan, np.float32)},
        {"matrix": np.full((3, 8), -128, np.int8)},
        {"inverse": np.full((3, 8), np.inf, np.float32)},
        {"delta": np.full(3, 0.1, np.float32)},
        {"offset": np.ones(3, np.float32)},
        {"factor": np.ones(4, np.float32)},
    ):
        with pytest.raises(ValueError, match=next(iter(change)) + "|must be|fill"):
            replace(group, **change)


@pytest.mark.slow
def test_transforms_on_other_processors(tmp_path: Path) -> None:
    """Machine code for processors without AVX, and no native library, gives the same bits."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": "nehalem",
        "NUMBA_CPU_FEATURES": "",
        "KVSERVE_SIMD": "numba",
        "KVSERVE_CACHE_DIR": str(tmp_path),
    }
    folder = Path(__file__).parent
    files = [str(folder / f"test_{name}.py") for name in ("linear", "rotate", "hadamard")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
