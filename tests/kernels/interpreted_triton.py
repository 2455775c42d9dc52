"""GPU kernels against their definitions, run in Triton's interpreter by `test_triton` in a process of its own.

Shapes are small and odd: the interpreter is slow, and edges are where kernels go wrong.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvserve_kernels import ladder, rans
from kvserve_kernels.absmax import absmax_ref, absmax_triton
from kvserve_kernels.bits_ref import narrow
from kvserve_kernels.escape import escape_ref, escape_triton
from kvserve_kernels.floats import floats_ref, floats_triton
from kvserve_kernels.fp8 import fp8_ref, fp8_triton
from kvserve_kernels.hadamard import hadamard_ref, hadamard_triton
from kvserve_kernels.ladder import ladder_ref, ladder_triton
from kvserve_kernels.ladder.tables import prices
from kvserve_kernels.linear import linear_ref, linear_triton
from kvserve_kernels.linear.plan import Group, Plan
from kvserve_kernels.lloyd import lloyd_ref, lloyd_triton
from kvserve_kernels.mean import Turning, mean_ref, mean_triton
from kvserve_kernels.minmax import minmax_ref, minmax_triton
from kvserve_kernels.pack import pack_ref, pack_triton
from kvserve_kernels.predict import predict_ref, predict_triton
from kvserve_kernels.rans import rans_ref, rans_triton, symbols_cpu, symbols_triton, tables_triton
from kvserve_kernels.rotate import rotate_ref, rotate_triton, tables
from kvserve_kernels.scale import scale_ref, scale_triton
from kvserve_kernels.step import step_ref, step_triton

torch.set_num_threads(1)
TYPES = pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=["bfloat16", "float32"])
SIGNED: dict[Any, Any] = {np.uint16: np.int16, np.uint32: np.int32}


def tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor, uint16 as bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(value: torch.Tensor) -> NDArray[Any]:
    """Undo `tensor`."""
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(np.uint16)
    return value.numpy()


def sample(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return values with outliers, zeros and tiny numbers among them."""
    values = rng.standard_normal(shape).astype(np.float32)
    values *= rng.choice(np.array([1, 1, 1, 0, 1e-36, 100, 3e4], np.float32), shape)
    return narrow(values, dtype)


def levels(
    seed: int, channels: int, tokens: int, scale: float
) -> tuple[NDArray[np.int16], NDArray[np.uint8], list[rans.Model]]:
    """Return heavy-tailed levels, a table for each channel and the models of two tables."""
    rng = np.random.default_rng(seed)
    values = np.clip(rng.standard_t(1.5, (channels, tokens)) * scale, -32768, 32767)
    table_of = rng.integers(0, 2, channels).astype(np.uint8)
    table_of[0] = 0
    whole = values.astype(np.int16)
    return whole, table_of, rans.build(whole, table_of)


def frequencies(models: list[rans.Model]) -> NDArray[np.uint32]:
    """Return the frequencies of tables, ``[tables, 32]``."""
    rows = np.zeros((len(models), 32), np.uint32)
    for row, model in zip(rows, models, strict=True):
        row[: len(model.frequencies)] = model.frequencies
    return rows


RANS = pytest.mark.parametrize(
    ("channels", "tokens", "groups", "scale"),
    [
        pytest.param(5, 70, 1, 3, id="one-group"),
        pytest.param(7, 100, 2, 40, id="two-groups"),
        pytest.param(3, 33, 2, 9000, id="wide"),
        pytest.param(1, 5, 1, 20, id="five-tokens"),
    ],
)


@RANS
def test_rans(channels: int, tokens: int, groups: int, scale: float) -> None:
    """States and words are those of the definition, levels come back, and an altered stream is noticed."""
    values, table_of, models = levels(tokens, channels, tokens, scale)
    symbols, planes, escapes = symbols_cpu.split(values, table_of, models)
    put, of = tables_triton.put_tables(models, "cpu"), torch.from_numpy(table_of)
    words, offsets, states = rans_triton.encode(torch.from_numpy(values), put, of, groups=groups)
    for s, start in enumerate(range(0, tokens, 32 * groups)):
        part = range(start, min(start + 32 * groups, tokens))
        first, coded = rans_ref.encode(symbols, part, table_of, frequencies(models))
        stream = words[int(offsets[s]) : int(offsets[s + 1])]
        np.testing.assert_array_equal(stream.numpy().view(np.uint16), coded)
        np.testing.assert_array_equal(states[s].numpy().view(np.uint32)[: first.size], first)
    assert int(offsets[-1]) == words.numel()

    low = symbols_triton.low_planes(torch.from_numpy(values), put, of)
    np.testing.assert_array_equal(low.numpy().view(np.uint32), planes)
    taken = symbols_triton.take_escapes(torch.from_numpy(values), put, of)
    np.testing.assert_array_equal(taken.numpy(), escapes)
    decoded, sound = rans_triton.decode(
        words, offsets, states, put, of, low, tokens=tokens, groups=groups
    )
    assert sound.all()
    assert symbols_triton.put_escapes(decoded, put, of, taken)
    np.testing.assert_array_equal(decoded.numpy(), values)

    wrong = states ^ torch.tensor([[1]] * (len(states) - 1) + [[0]], dtype=torch.int32)
    _, sound = rans_triton.decode(words, offsets, wrong, put, of, low, tokens=tokens, groups=groups)
    assert sound.tolist() == [False] * (len(states) - 1) + [True]
    if taken.numel():
        assert not symbols_triton.put_escapes(decoded, put, of, taken[1:])


def test_rans_leaves_out_what_takes_no_bits() -> None:
    """Channels of one value take no words, wherever they lie, and come back; so do a piece's of nothing else."""
    models = [
        rans.Model(base=0, low_bits=0, escape=False, frequencies=(4096,)),
        rans.Model(base=-1, low_bits=0, escape=False, frequencies=(1000, 2096, 1000)),
    ]
    put = tables_triton.put_tables(models, "cpu")
    whole = np.random.default_rng(4).integers(-1, 2, (6, 40)).astype(np.int16)
    none = torch.empty(0, dtype=torch.int32)
    for ids in ([0, 1, 0, 1, 1, 0], [0, 0]):
        table_of = np.array(ids, np.uint8)
        values = whole[: len(ids)] * table_of[:, None].astype(np.int16)
        of = torch.from_numpy(table_of)
        coded = rans_triton.encode(torch.from_numpy(values), put, of, groups=1)
        words = [
            rans_ref.encode(
                (values + 1).astype(np.uint8)[table_of == 1],
                part,
                np.ones(sum(ids), np.uint8),
                frequencies([models[1]] * 2),
            )[1]
            for part in (range(32), range(32, 40))
        ]
        np.testing.assert_array_equal(coded[0].numpy().view(np.uint16), np.concatenate(words))
        decoded, sound = rans_triton.decode(*coded, put, of, none, tokens=40, groups=1)
        assert sound.all()
        np.testing.assert_array_equal(decoded.numpy(), values)


def test_rans_codes_as_the_ladder() -> None:
    """With the ladder's tables, streams, low bits and escapes are those that the CPU writes."""
    rng = np.random.default_rng(5)
    scales = np.array([0, 0.2, 1, 9, 70, 4000])[:, None]
    values = np.clip(rng.standard_t(2, (6, 70)) * scales, -32768, 32767).astype(np.int16)
    ids = ladder.choose(values)
    expected = rans.encode_values(values, ids, ladder.tables(), 1)
    put = tables_triton.put_tables(ladder.tables().models, "cpu")
    of, whole = torch.from_numpy(ids), torch.from_numpy(values)
    words, offsets, states = rans_triton.encode(whole, put, of, groups=1)
    planes = symbols_triton.low_planes(whole, put, of)
    escapes = symbols_triton.take_escapes(whole, put, of)
    assert offsets.diff().tolist() == [stream.size for stream in expected.words]
    np.testing.assert_array_equal(words.numpy().view(np.uint16), np.concatenate(expected.words))
    lanes = states.numpy().view(np.uint32).reshape(-1)[:70]
    np.testing.assert_array_equal(lanes, np.concatenate(expected.states))
    np.testing.assert_array_equal(planes.numpy().view(np.uint32), expected.planes)
    np.testing.assert_array_equal(escapes.numpy(), expected.escapes)
    assert escapes.numel()
    decoded, sound = rans_triton.decode(
        words, offsets, states, put, of, planes, tokens=70, groups=1
    )
    assert sound.all()
    assert symbols_triton.put_escapes(decoded, put, of, escapes)
    np.testing.assert_array_equal(decoded.numpy(), values)


def test_rans_divides_exactly() -> None:
    """The product that stands for a division gives its quotient for every frequency, at both ends of every quotient."""
    f = np.arange(1, 4097, dtype=np.uint64)
    made = tables_triton.divisor_tables(np.pad(f[:, None].astype(np.uint32), ((0, 0), (0, 31))))[
        :, 0
    ]
    reciprocal, shift, carry = made >> 32, made >> 28 & 15, made >> 24 & 1
    edges = np.array([0, 1, 2, (1 << 20) - 2, (1 << 20) - 1])
    for quotient in np.append(edges, np.random.default_rng(0).integers(0, 1 << 20, 500)).astype(
        np.uint64
    ):
        for x in (f * quotient, f * quotient + f - np.uint64(1)):
            found = (x + carry) * reciprocal >> shift + np.uint64(32)
            np.testing.assert_array_equal(found, quotient)


@pytest.mark.parametrize(
    ("rows", "heads", "dim", "pairs", "interleaved", "tokens", "dtype"),
    [
        pytest.param(4, 2, 16, 8, False, 37, torch.bfloat16, id="half-split"),
        pytest.param(2, 1, 12, 4, True, 5, torch.float32, id="interleaved-partial"),
        pytest.param(2, 3, 20, 6, False, 130, torch.float16, id="partial"),
        pytest.param(2, 1, 8, 0, False, 1, torch.bfloat16, id="no-rotation"),
    ],
)
def test_linear(
    rows: int,
    heads: int,
    dim: int,
    pairs: int,
    interleaved: bool,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    """Levels are those of the definition bit by bit; values come back as close as bfloat16 products allow."""
    rng = np.random.default_rng(tokens)
    groups = []
    for part in np.array_split(np.arange(rows * heads), 2):
        width, components = part.size * dim, 13
        turns = (part // heads < rows // 2) & (pairs > 0)
        groups.append(
            Group(
                rows=(part // heads).astype(np.int32),
                heads=(part % heads).astype(np.int32),
                rotations=np.where(turns, 0, -1).astype(np.int32),
                mean=rng.standard_normal(width).astype(np.float32),
                inv_scale=(rng.random(width) * 30 + 5).astype(np.float32),
                matrix=rng.integers(-127, 128, (components, width)).astype(np.int8),
                factor=(rng.random(components) * 1e-3 + 1e-5).astype(np.float32),
                offset=np.full(components, 0.46, np.float32),
                delta=np.full(components, -0.05, np.float32),
                inverse=rng.standard_normal((components, width)).astype(np.float32),
            )
        )
    plan = Plan(groups=tuple(groups), dim=dim)
    native = torch.from_numpy(rng.standard_normal((rows, tokens, heads, dim)).astype(np.float32))
    native[0, tokens // 2] *= 200
    native = native.to(dtype)
    cos, sin = np.zeros((2, 0, tokens, 0), np.float32)
    if pairs:
        inv_freq = 10_000.0 ** (-np.arange(pairs) / pairs)
        cos, sin = (table[None] for table in tables(inv_freq, 1.0, 3, tokens))
    turn = torch.from_numpy(cos.copy()), torch.from_numpy(sin.copy())
    put = linear_triton.put_plan(plan, "cpu", torch.float32)

    coded = linear_triton.forward(native, put, *turn, interleaved)
    expected = linear_ref.forward(array(native), plan, cos, sin, interleaved)
    assert coded is not None
    assert expected is not None
    assert np.abs(expected).max() > 20
    np.testing.assert_array_equal(coded.numpy(), expected)

    restored = torch.zeros_like(native)
    linear_triton.inverse(coded, put, *turn, interleaved, restored)
    wanted = np.zeros_like(array(native))
    linear_ref.inverse(expected, plan, cos, sin, interleaved, wanted)
    np.testing.assert_allclose(
        restored.float().numpy(), tensor(wanted).float().numpy(), rtol=2**-8, atol=1e-3
    )


def test_linear_computes_wide_tokens_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token too wide for registers, of which values are computed twice, gives the same bytes."""
    monkeypatch.setattr(linear_triton, "_MOST_PAIRS", 0)
    monkeypatch.setattr(linear_triton, "_PAIRS", 16)
    test_linear(4, 2, 16, 8, False, 37, torch.bfloat16)


def test_linear_refuses_what_has_no_shift() -> None:
    """A value that is 2^32 times what fills int8 has no levels."""
    group = Group(
        rows=np.zeros(1, np.int32),
        heads=np.zeros(1, np.int32),
        rotations=np.full(1, -1, np.int32),
        mean=np.zeros(2, np.float32),
        inv_scale=np.ones(2, np.float32),
        matrix=np.ones((1, 2), np.int8),
        factor=np.ones(1, np.float32),
        offset=np.zeros(1, np.float32),
        delta=np.zeros(1, np.float32),
        inverse=np.ones((1, 2), np.float32),
    )
    put = linear_triton.put_plan(Plan(groups=(group,), dim=2), "cpu", torch.float32)
    none = torch.zeros((0, 1, 0))
    for value, fits in ((127.0 * 2**31, True), (127.0 * 2**32, False)):
        native = torch.tensor([value, 0.0]).view(1, 1, 1, 2)
        made = linear_triton.forward(native, put, none, none, False)
        assert (made is not None) == fits


@TYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(dtype: Any, interleaved: bool) -> None:
    """Keys turn back, and turn again, to the bits of the definition."""
    x = sample(np.random.default_rng(1), (2, 5, 3, 12), dtype)
    cos, sin = tables(10_000.0 ** (-np.arange(4) / 4), 1.0, 7, 5)
    turn = torch.from_numpy(cos), torch.from_numpy(sin)
    back = rotate_triton.unrotate(tensor(x), *turn, interleaved)
    expected = rotate_ref.unrotate(x, cos, sin, interleaved)
    np.testing.assert_array_equal(back.numpy(), expected)
    again = rotate_triton.rotate(back, *turn, interleaved, tensor(x).dtype)
    wanted = rotate_ref.rotate(expected, cos, sin, interleaved, dtype)
    np.testing.assert_array_equal(array(again), wanted)


@pytest.mark.parametrize("width", range(1, 9))
def test_pack(width: int) -> None:
    """Codes are packed bit by bit as defined, and come back."""
    codes = np.random.default_rng(width).integers(0, 1 << width, 101, dtype=np.uint8)
    packed = pack_triton.pack(torch.from_numpy(codes), width)
    np.testing.assert_array_equal(packed.numpy(), pack_ref.pack(codes, width))
    np.testing.assert_array_equal(pack_triton.unpack(packed, 101, width).numpy(), codes)


@TYPES
@pytest.mark.parametrize(
    ("rows", "dim", "group", "levels"), [(5, 70, 64, 16), (3, 33, 5, 4), (2, 130, 130, 256)]
)
def test_minmax_rows(dtype: Any, rows: int, dim: int, group: int, levels: int) -> None:
    """Rows are quantised and restored as defined."""
    x = sample(np.random.default_rng(dim), (rows, dim), dtype)
    made = minmax_triton.encode_rows(tensor(x), group=group, levels=levels)
    expected = minmax_ref.encode(x, group=group, levels=levels)
    assert made is not None
    assert expected is not None
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(array(a), b)
    restored = minmax_triton.decode_rows(*made, group=group, levels=levels)
    wanted = minmax_ref.decode(*expected, group=group, levels=levels)
    np.testing.assert_array_equal(array(restored), wanted)


@TYPES
@pytest.mark.parametrize(
    ("shape", "group", "levels"), [((2, 70, 33), 32, 16), ((1, 5, 130), 3, 2)], ids=str
)
def test_minmax_columns(dtype: Any, shape: tuple[int, int, int], group: int, levels: int) -> None:
    """Columns are quantised and restored as defined."""
    x = sample(np.random.default_rng(group), shape, dtype)
    made = minmax_triton.encode_columns(tensor(x), group=group, levels=levels)
    expected = minmax_ref.encode(x, group=group, levels=levels)
    assert made is not None
    assert expected is not None
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(array(a), b)
    restored = minmax_triton.decode_columns(*made, group=group, levels=levels)
    wanted = minmax_ref.decode(*expected, group=group, levels=levels)
    np.testing.assert_array_equal(array(restored), wanted)


def test_minmax_refuses_a_span_beyond_float32() -> None:
    """A group from -3e38 to 3e38 has no float32 span and is refused, by rows and by columns."""
    x = torch.tensor([[-3e38, 3e38, 0.0]])
    # the interpreter computes with numpy, which would warn of the overflow
    with np.errstate(over="ignore", invalid="ignore"):
        assert minmax_triton.encode_rows(x, group=3, levels=4) is None
        assert minmax_triton.encode_columns(x.view(1, 3, 1), group=3, levels=4) is None


@TYPES
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8(dtype: Any, scaled: bool) -> None:
    """Values become the nearest e4m3 number, and codes the number they stand for."""
    x = sample(np.random.default_rng(3), (5, 130), dtype)
    codes, peaks = fp8_triton.encode(tensor(x), scaled=scaled)
    expected_codes, expected_peaks = fp8_ref.encode(x, scaled=scaled)
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(array(peaks), expected_peaks)
    restored = fp8_triton.decode(codes, peaks, scaled=scaled)
    wanted = fp8_ref.decode(expected_codes, expected_peaks, scaled=scaled)
    np.testing.assert_array_equal(array(restored), wanted)


@TYPES
@pytest.mark.parametrize("dim", [7, 96, 128])
def test_hadamard(dtype: Any, dim: int) -> None:
    """Sums and differences come in the defined order, and the way back rounds as defined."""
    x = sample(np.random.default_rng(dim), (5, dim), dtype)
    made, expected = hadamard_triton.hadamard(tensor(x)), hadamard_ref.hadamard(x)
    assert expected is not None
    np.testing.assert_array_equal(made.numpy(), expected)
    restored = hadamard_triton.hadamard(made, tensor(x).dtype)
    np.testing.assert_array_equal(array(restored), hadamard_ref.restore(expected, dtype))


@pytest.mark.parametrize(
    ("word", "dtype", "mantissa"),
    [
        pytest.param(np.uint16, torch.bfloat16, 7, id="bfloat16"),
        pytest.param(np.uint16, torch.float16, 10, id="float16"),
        pytest.param(np.uint32, torch.float32, 23, id="float32"),
    ],
)
def test_floats(word: Any, dtype: torch.dtype, mantissa: int) -> None:
    """Every kind of bit pattern is split as defined and joined again."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, np.iinfo(word).max, 5000, dtype=word, endpoint=True)
    values = torch.from_numpy(words.view(SIGNED[word])).view(dtype)
    exponents, rest = floats_triton.split(values)
    expected = floats_ref.split(words, mantissa)
    np.testing.assert_array_equal(exponents.numpy(), expected[0])
    np.testing.assert_array_equal(rest.numpy().view(expected[1].dtype), expected[1])
    joined = floats_triton.join(exponents, rest, dtype)
    np.testing.assert_array_equal(joined.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("count", "spread"), [(0, 1), (1, 5), (70_001, 3), (9000, 40)])
def test_escape(count: int, spread: float) -> None:
    """Book, codes and escapes are as defined, bytes come back, and positions that do not rise are refused."""
    rng = np.random.default_rng(count)
    data = np.clip(np.rint(rng.standard_normal(count) * spread + 100), 0, 255).astype(np.uint8)
    made, expected = escape_triton.encode(torch.from_numpy(data)), escape_ref.encode(data)
    for name in ("book", "codes", "counts", "positions", "values"):
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(getattr(made, name).numpy().view(wanted.dtype), wanted)
    restored = escape_triton.decode(made, count)
    assert restored is not None
    np.testing.assert_array_equal(restored.numpy(), data)
    if expected.positions.size > 1:
        made.positions[1] = made.positions[0]
        assert escape_triton.decode(made, count) is None


@TYPES
@pytest.mark.parametrize(("dim", "bins"), [(70, 4), (130, 32), (64, 255)])
def test_absmax(dtype: Any, dim: int, bins: int) -> None:
    """Codes, peaks and values are as defined, halves of a step among them."""
    x = sample(np.random.default_rng(dim), (5, dim), dtype)
    x[0, :4] = narrow(np.array([bins // 2 - 1, 0.5, 1.5, -0.5], np.float32), dtype)
    x[0, 4:] = 0
    codes, peaks = absmax_triton.encode(tensor(x), bins)
    wanted_codes, wanted_peaks = absmax_ref.encode(x, bins)
    np.testing.assert_array_equal(codes.numpy(), wanted_codes)
    np.testing.assert_array_equal(array(peaks), wanted_peaks)
    restored = absmax_triton.decode(codes, peaks, bins)
    wanted = absmax_ref.decode(wanted_codes, wanted_peaks, bins)
    np.testing.assert_array_equal(array(restored), wanted)


@TYPES
@pytest.mark.parametrize(("dim", "count"), [(7, 15), (66, 3)])
def test_lloyd(dtype: Any, dim: int, count: int) -> None:
    """Root mean squares, codes and values are as defined, and a code past the last counts as the last."""
    rng = np.random.default_rng(dim)
    x = sample(rng, (130, dim), dtype)
    x[1] = 0
    scales = lloyd_triton.root_mean_squares(tensor(x), tensor(x).dtype)
    wanted_scales = lloyd_ref.root_mean_squares(x, dtype)
    assert scales is not None
    assert wanted_scales is not None
    np.testing.assert_array_equal(array(scales), wanted_scales)
    between = np.sort(rng.standard_normal(count)).astype(np.float32)
    codes = lloyd_triton.encode(tensor(x), scales, torch.from_numpy(between))
    np.testing.assert_array_equal(codes.numpy(), lloyd_ref.encode(x, wanted_scales, between))
    codes[0, :3] = 255
    restored = lloyd_triton.decode(codes, scales, torch.from_numpy(between), tensor(x).dtype)
    wanted = lloyd_ref.decode(codes.numpy(), wanted_scales, between, dtype)
    np.testing.assert_array_equal(array(restored), wanted)


def test_mean_squares_beyond_float32_are_refused() -> None:
    """A row whose mean square, or whose root, float32 can't hold has no scale."""
    x = torch.full((3, 5), 1e19)
    assert scale_triton.scale(x) is not None
    x[1] = 3e38
    # the interpreter computes with numpy, which would warn of the overflow
    with np.errstate(over="ignore"):
        assert scale_triton.scale(x) is None
    assert lloyd_triton.root_mean_squares(x, torch.float32) is not None
    x[1, 0] = float("inf")
    assert lloyd_triton.root_mean_squares(x, torch.float32) is None


@TYPES
@pytest.mark.parametrize("dim", [5, 64])
def test_scale(dtype: Any, dim: int) -> None:
    """Quotients and exponents are as defined, and so is what they give back."""
    x = sample(np.random.default_rng(dim), (130, dim), dtype)
    x[1] = 0
    made, expected = scale_triton.scale(tensor(x)), scale_ref.scale(x)
    assert made is not None
    assert expected is not None
    for a, b in zip(made, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
    restored = scale_triton.unscale(*made, tensor(x).dtype)
    np.testing.assert_array_equal(array(restored), scale_ref.unscale(*expected, dtype))


@TYPES
@pytest.mark.parametrize("shape", [(2, 21, 130), (1, 1, 3)], ids=str)
def test_step(dtype: Any, shape: tuple[int, int, int]) -> None:
    """Means, differences, steps, codes and values are as defined; a layer of zeros has no step."""
    x = sample(np.random.default_rng(shape[1]), shape, dtype)
    centred, expected = step_triton.centre(tensor(x)), step_ref.centre(x)
    assert centred is not None
    assert expected is not None
    np.testing.assert_array_equal(centred[0].numpy(), expected[0])
    np.testing.assert_array_equal(array(centred[1]), expected[1])
    back = step_triton.uncentre(*centred)
    np.testing.assert_array_equal(array(back), step_ref.uncentre(*expected))
    x[-1, :, :] = 0 if shape[0] > 1 else x[-1]
    steps, wanted_steps = (
        step_triton.relative_steps(tensor(x), 0.3),
        step_ref.relative_steps(x, 0.3),
    )
    np.testing.assert_array_equal(steps.numpy(), wanted_steps)
    codes, wanted_codes = step_triton.quantise(tensor(x), steps), step_ref.quantise(x, wanted_steps)
    assert codes is not None
    assert wanted_codes is not None
    np.testing.assert_array_equal(codes.numpy(), wanted_codes)
    restored = step_triton.dequantise(codes, steps, tensor(x).dtype)
    np.testing.assert_array_equal(
        array(restored), step_ref.dequantise(wanted_codes, wanted_steps, dtype)
    )


def test_step_refuses_what_does_not_fit() -> None:
    """A code past 32,767 and a difference past float32 are refused, the last that fit are not."""
    one = torch.ones(1)
    x = torch.tensor([[[32767.49, -32767.49]]])
    made = step_triton.quantise(x, one)
    assert made is not None
    assert made.tolist() == [[[32767, -32767]]]
    assert step_triton.quantise(x + 0.02, one) is None
    with np.errstate(over="ignore"):
        assert step_triton.centre(torch.tensor([[[3e38], [3e38], [-3e38]]])) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pairs", [0, 4, 24])
def test_token_means(dtype: torch.dtype, pairs: int) -> None:
    """Means over tokens are those of the definition, of a part of the tokens too, turned back or not."""
    rng = np.random.default_rng(pairs)
    whole = torch.from_numpy(rng.standard_normal((70, 3, 48)).astype(np.float32) * 9).to(dtype)
    chosen, turning = whole[::2], None
    if pairs:
        angles = tables(10_000.0 ** (-np.arange(pairs) / pairs), 1.0, 7, 70)
        cos, sin = (table[::2] for table in angles)
        turning = Turning.of(cos, sin, pairs == 4, 3, 48)
    made = mean_triton.token_means(chosen, turning)
    wanted = mean_ref.token_means(np.ascontiguousarray(array(chosen)), turning)
    np.testing.assert_array_equal(made.numpy(), wanted)


def test_combine() -> None:
    """Values of components are those of the definition."""
    rng = np.random.default_rng(2)
    levels = (rng.integers(-32768, 32768, 19) * rng.integers(0, 2, 19)).astype(np.int16)
    rows = narrow(rng.standard_normal((19, 130)).astype(np.float32), np.uint16)
    made = mean_triton.combine(torch.from_numpy(levels), tensor(rows))
    np.testing.assert_array_equal(made.numpy(), mean_ref.combine(levels, rows))


@pytest.mark.parametrize(("channels", "tokens"), [(37, 40), (2, 530), (1, 1)])
def test_ladder(channels: int, tokens: int) -> None:
    """Tables are chosen as defined: the cheapest, or that of the channel after, and 0 for zeros."""
    rng = np.random.default_rng(channels)
    scales = rng.choice(np.array([0, 0.1, 1, 1.1, 1.2, 60, 9000]), (channels, 1))
    values = np.clip(rng.standard_t(2, (channels, tokens)) * scales, -32767, 32767).astype(np.int16)
    wanted = ladder_ref.choose(values, prices().tolist())
    assert ladder_triton.choose(torch.from_numpy(values)).tolist() == wanted


@pytest.mark.parametrize("sources", [1, 8])
def test_predict(sources: int) -> None:
    """Predictions are those of the definition."""
    rng = np.random.default_rng(sources)
    before = rng.standard_normal((21, 130)).astype(np.float32)
    places = rng.integers(0, 130, (130, sources)).astype(np.uint16)
    weights = rng.standard_normal((130, sources)).astype(np.float16)
    made = predict_triton.apply(
        torch.from_numpy(before),
        torch.from_numpy(places.astype(np.int32)),
        torch.from_numpy(weights),
    )
    np.testing.assert_array_equal(made.numpy(), predict_ref.apply(before, places, weights))
