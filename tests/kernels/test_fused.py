"""The transform and the coder in one: what they write and read is what the two steps do."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_api.errors import WireError
from kvserve_kernels import fused, linear, rotate
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.linear import Group, Plan, linear_native
from kvserve_kernels.linear.linear_native import Level
from kvserve_strategies.ladder import decode_levels, encode_levels, stream_groups

pytestmark = pytest.mark.skipif(
    not fused.available(), reason="the library or the processor has no dot products of AVX-512"
)
LEVELS = [level for level in Level if 0 < level <= linear_native.level()]
DIM, ROWS = 16, 2
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Turns = tuple[NDArray[np.float32], NDArray[np.float32], bool]


def a_plan(rng: np.random.Generator, groups: int, components: int, spread: float) -> Plan:
    """Return a plan of groups that join keys and values of one row each."""
    made = []
    for row in range(groups):
        width = 2 * DIM
        made.append(
            Group(
                rows=np.array([row, ROWS + row], np.int32),
                heads=np.zeros(2, np.int32),
                rotations=np.array([0, -1], np.int32),
                mean=rng.standard_normal(width).astype(np.float32),
                inv_scale=np.full(width, 25, np.float32),
                matrix=rng.integers(-127, 128, (components, width), dtype=np.int8),
                factor=(spread * 10.0 ** rng.uniform(-6, -3, components)).astype(np.float32),
                offset=np.full(components, 0.45, np.float32),
                delta=np.full(components, -0.05, np.float32),
                inverse=(rng.standard_normal((components, width)) / width).astype(np.float32),
            )
        )
    return Plan(groups=tuple(made), dim=DIM)


def halves(rng: np.random.Generator, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return keys and values ``[rows, tokens, heads, dim]`` in bfloat16, part of something larger."""
    wide = rng.standard_normal((2, ROWS, tokens + 3, 2, DIM)).astype(np.float32)
    keys, values = narrow(wide, np.uint16)[:, :, 3:, :1]
    return keys, values


def turns(tokens: int) -> Turns:
    """Return rotations of one kind."""
    tables = rotate.tables(10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2)), 1.0, 5, tokens)
    return tables[0][None], tables[1][None], False


def joined(pieces: tuple[NDArray[Any], ...]) -> NDArray[np.uint8]:
    """Return a section as it is sent."""
    return np.frombuffer(bytearray(b"".join(piece.tobytes() for piece in pieces)), np.uint8)


def values_of(levels: NDArray[np.int16], plan: Plan, like: tuple[NDArray[Any], ...]) -> Any:
    """Return what levels stand for, all rows in one array."""
    out = np.zeros((2 * ROWS, *like[0].shape[1:]), np.uint16)
    linear.inverse(levels, plan, *turns(levels.shape[1]), out)
    return out


@pytest.mark.parametrize("level", LEVELS)
@SETTINGS
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 300),
    groups=st.integers(1, ROWS),
    components=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
)
def test_one_section(
    monkeypatch: pytest.MonkeyPatch,
    level: Level,
    seed: int,
    tokens: int,
    groups: int,
    components: int,
    spread: float,
) -> None:
    """A piece becomes the section that the two steps write, or none, and comes back the same."""
    monkeypatch.setattr(linear_native, "level", lambda: level)
    rng = np.random.default_rng(seed)
    plan, apart = a_plan(rng, groups, components, spread), halves(rng, tokens)
    levels = linear.forward(np.concatenate(apart), plan, *turns(tokens))
    assert levels is not None
    np.testing.assert_array_equal(linear.forward(apart, plan, *turns(tokens)), levels)
    expected = joined(encode_levels(levels))
    size = stream_groups(int(levels.any(axis=1).sum()), tokens)
    made = fused.encode(apart, plan, *turns(tokens), max(size, 1))
    if size == 0 or expected[0] == 0:
        assert made is None
    else:
        np.testing.assert_array_equal(made, expected)
    assert size <= 1 or fused.encode(apart, plan, *turns(tokens), size - 1) is None
    back = np.zeros_like(apart[0]), np.zeros_like(apart[1])
    assert fused.decode(expected, plan, *turns(tokens), back)
    np.testing.assert_array_equal(np.concatenate(back), values_of(levels, plan, apart))


@SETTINGS
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 200), count=st.integers(1, 6))
def test_runs(seed: int, tokens: int, count: int) -> None:
    """Tokens in any order, in runs of any length with steps of their own, are coded as run by run."""
    rng = np.random.default_rng(seed)
    whole, apart = a_plan(rng, 1, 30, 1.0), halves(rng, tokens)
    (base,) = whole.groups
    order = rng.permutation(tokens)
    cuts = np.unique(rng.integers(0, tokens, count))
    starts = sorted({0, *cuts.tolist(), tokens})
    plans = []
    for at in range(len(starts) - 1):
        kept = int(rng.integers(1, 31))
        group = base.first(
            kept,
            factor=base.factor[:kept] * np.float32(at + 1),
            offset=base.offset[:kept],
            delta=base.delta[:kept],
            unit=1 / (at + 1),
        )
        plans.append(Plan(groups=(group,), dim=DIM))
    coded = fused.encode_runs(apart, plans, order, starts, *turns(tokens))
    assert coded is not None
    bodies, lengths = coded
    cos, sin, pairs = turns(tokens)
    expected = np.zeros((2 * ROWS, *apart[0].shape[1:]), np.uint16)
    at = 0
    for run, plan in enumerate(plans):
        chosen = order[starts[run] : starts[run + 1]]
        part = np.concatenate(apart)[:, chosen]
        tables = (cos[:, chosen], sin[:, chosen], pairs)
        levels = linear.forward(part, plan, *tables)
        assert levels is not None
        body = joined(encode_levels(levels))
        np.testing.assert_array_equal(bodies[at : at + lengths[run]], body)
        assert not bodies[at + lengths[run] : at + -(-lengths[run] // 8) * 8].any()
        at += -(-int(lengths[run]) // 8) * 8
        back = np.zeros_like(part)
        linear.inverse(levels, plan, *tables, back)
        expected[:, chosen] = back
    assert at == bodies.size
    out = np.zeros_like(apart[0]), np.zeros_like(apart[1])
    assert fused.decode_runs(bodies, lengths, plans, order, starts, *turns(tokens), out)
    np.testing.assert_array_equal(np.concatenate(out), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_no_level_can_say(bad: float) -> None:
    """NaN, infinity and numbers far beyond the calibrated range are refused, wherever they stand."""
    rng = np.random.default_rng(1)
    plan = a_plan(rng, ROWS, 20, 1.0)
    for at in range(2 * ROWS):
        apart = halves(rng, 40)
        apart[at // ROWS][at % ROWS, 17 + at, 0, at] = narrow(
            np.array([bad], np.float32), np.uint16
        )[0]
        assert linear.forward(apart, plan, *turns(40)) is None
        assert fused.encode(apart, plan, *turns(40), 2) is None
        one = Plan(groups=plan.groups[at % ROWS :][:1], dim=DIM)
        assert fused.encode_runs(apart, [one], np.arange(40), [0, 40], *turns(40)) is None


def test_spoiled_sections_are_refused_alike() -> None:
    """A spoiled section is refused exactly where Python's reader refuses it, else it is read as that reads it."""
    rng = np.random.default_rng(2)
    refused = 0
    for at in range(250):
        tokens = int(rng.integers(1, 150))
        plan = a_plan(rng, ROWS, 12, float(rng.choice([0.0, 1.0, 100.0])))
        apart = halves(rng, tokens)
        levels = linear.forward(apart, plan, *turns(tokens))
        assert levels is not None
        section = joined(encode_levels(levels))
        if at % 3 == 0:
            section = section[: int(rng.integers(0, section.size))].copy()
        else:
            where = np.minimum(rng.exponential(30, 2).astype(int), section.size - 1)
            section[where] = rng.integers(0, 256, 2)
        out = np.zeros_like(apart[0]), np.zeros_like(apart[1])
        taken = fused.decode(section, plan, *turns(tokens), out)
        try:
            read = decode_levels(section, plan.components, tokens)
        except WireError:
            assert not taken
            refused += 1
        else:
            assert taken
            np.testing.assert_array_equal(np.concatenate(out), values_of(read, plan, apart))
    assert 80 < refused < 250


def test_arguments_that_do_not_fit() -> None:
    """What would make C read or write outside an array is refused before it is called."""
    rng = np.random.default_rng(3)
    plan, apart = a_plan(rng, 1, 5, 1.0), halves(rng, 8)
    other = (apart[0], np.ascontiguousarray(apart[1]))
    with pytest.raises(ValueError, match="alike"):
        fused.encode(other, plan, *turns(8), 1)
    for order, starts in (
        (np.arange(8), [0, 7]),
        (np.arange(8), [0, 4, 4, 8]),
        (np.arange(1, 9), [0, 8]),
        (np.arange(-1, 7), [0, 8]),
    ):
        with pytest.raises(ValueError, match="runs"):
            fused.encode_runs(apart, [plan] * (len(starts) - 1), order, starts, *turns(8))
    with pytest.raises(ValueError, match="lengths"):
        fused.decode_runs(
            np.zeros(16, np.uint8), np.array([17]), [plan], np.arange(8), [0, 8], *turns(8), apart
        )
