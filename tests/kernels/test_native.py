"""The native library: how it is found and chosen, and that all who do the work write the same bytes."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_api.errors import SpecError
from kvserve_kernels import rans
from kvserve_kernels.native import Simd, build, coder, simd
from kvserve_kernels.rans import rans_ref
from kvserve_kernels.rans.values import Coded, Tables

NAMES = [level.name.lower() for level in Simd]
SEEDS = st.integers(0, 2**32 - 1)


def levels() -> list[str]:
    """Return who can do the work on this machine."""
    library = coder()
    widest = -1 if library is None else library.kvserve_widest()
    return [level.name.lower() for level in Simd if level <= widest]


@pytest.fixture(autouse=True)
def clean_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without a choice."""
    monkeypatch.setenv("KVSERVE_SIMD", "")


def test_the_library_is_there() -> None:
    """A machine with a compiler has the library of exactly these sources."""
    assert coder() is not None
    assert build.library_path().exists()


def test_only_old_functions_are_used() -> None:
    """No function of glibc newer than 2.17 is asked for, as the wheel's tag promises."""
    asked = set(re.findall(rb"GLIBC_(\d+)\.(\d+)", build.library_path().read_bytes()))
    versions = {(int(major), int(minor)) for major, minor in asked}
    assert versions
    assert max(versions) <= (2, 17)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable decides, if the processor can; without it the widest is taken."""
    monkeypatch.setenv("KVSERVE_SIMD", name)
    if name and name not in levels():
        with pytest.raises(SpecError, match="not supported here"):
            simd()
    else:
        assert simd().name.lower() == (name or levels()[-1])


@pytest.mark.parametrize("name", ["sse", "AVX2", "0"])
def test_unknown_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not known is refused."""
    monkeypatch.setenv("KVSERVE_SIMD", name)
    with pytest.raises(SpecError, match="must be one of numba, portable, avx2, avx512"):
        simd()


def test_other_sources_have_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A changed byte in a source changes the name, so an old library is never loaded."""
    names = set()
    for text in ("int a;", "int b;"):
        (tmp_path / "a.c").write_text(text)
        monkeypatch.setattr(build, "SOURCES", tmp_path)
        names.add(build.library_path().name)
    assert len(names) == 2
    assert all(re.fullmatch(r"_native-[0-9a-f]{16}\.so", name) for name in names)


def test_build_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler is said in so many words."""
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler is not there"):
        build.compile_to(tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def test_build_is_a_no_op_when_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not compiled again, and what other sources left is removed."""
    (tmp_path / "a.c").write_text("int a;")
    (tmp_path / "_native-0000.so").write_bytes(b"")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    made = build.build()
    before = made.stat().st_mtime_ns
    assert build.build() == made
    assert made.stat().st_mtime_ns == before
    assert list(tmp_path.glob("*.so")) == [made]


def random_models(rng: np.random.Generator, count: int) -> list[rans.Model]:
    """Return models of all kinds: one symbol, few, 32; with and without escape; 0 to 11 raw bits."""
    models = []
    for _ in range(count):
        symbols = int(rng.choice([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32]))
        cuts = np.sort(rng.integers(0, 4097, symbols - 1))
        frequencies = np.diff(np.concatenate([[0], cuts, [4096]]))
        low_bits = int(rng.choice([0, 0, 0, 1, 2, 3, 4, 11]))
        escape = bool(rng.integers(0, 2))
        if escape and frequencies[-1] == 0:
            most = int(frequencies.argmax())
            frequencies[most] -= 1
            frequencies[-1] += 1
        span = (symbols - escape) << low_bits
        base = (
            int(rng.integers(-32768, 32768)) if escape else int(rng.integers(-32768, 32769 - span))
        )
        models.append(
            rans.Model(
                base=base,
                low_bits=low_bits,
                escape=escape,
                frequencies=tuple(frequencies.tolist()),
            )
        )
    return models


def random_values(
    rng: np.random.Generator, models: list[rans.Model], ids: NDArray[np.uint8], tokens: int
) -> NDArray[np.int16]:
    """Return values that the models can carry."""
    values = np.empty((ids.size, tokens), np.int16)
    for row, number in zip(values, ids, strict=True):
        model = models[number]
        p = np.array(model.frequencies) / 4096
        symbols = rng.choice(p.size, tokens, p=p)
        low = rng.integers(0, 1 << model.low_bits, tokens)
        wide = model.base + (symbols << model.low_bits) + low
        if model.escape:
            outside = np.delete(
                np.arange(-32768, 32768),
                np.arange(max(model.base, -32768), min(model.base + model.span, 32768)) + 32768,
            )
            escaped = (symbols == p.size - 1) | (wide > 32767)
            if not outside.size:
                escaped[:] = False
                wide = np.full(tokens, model.base)
            wide = np.where(escaped, rng.choice(outside, tokens) if outside.size else 0, wide)
        row[:] = wide
    return values


def pieces(coded: Coded) -> list[bytes]:
    """Return everything that a coder made."""
    arrays: list[NDArray[Any]] = [*coded.states, coded.planes, *coded.words, coded.escapes]
    return [array.tobytes() for array in arrays]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=SEEDS,
    channels=st.integers(1, 40),
    tokens=st.integers(1, 300),
    count=st.integers(1, 6),
    groups=st.integers(1, 12),
)
def test_all_write_and_read_the_same(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    channels: int,
    tokens: int,
    count: int,
    groups: int,
) -> None:
    """numba, portable C, AVX2 and AVX-512 make the same bytes, and each decodes them to the values."""
    rng = np.random.default_rng(seed)
    models = random_models(rng, count)
    ids = rng.integers(0, count, channels).astype(np.uint8)
    values = random_values(rng, models, ids, tokens)
    tables = Tables.of(models)
    made = {}
    for name in levels():
        monkeypatch.setenv("KVSERVE_SIMD", name)
        coded = rans.encode_values(values, ids, tables, groups)
        made[name] = pieces(coded)
        decoded = rans.decode_values(coded, ids, tables, groups, tokens)
        assert decoded is not None, name
        np.testing.assert_array_equal(decoded, values, err_msg=name)
    assert all(other == made["numba"] for other in made.values())


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=SEEDS, channels=st.integers(1, 9), tokens=st.integers(1, 100), groups=st.integers(1, 4))
def test_streams_are_as_defined(
    monkeypatch: pytest.MonkeyPatch, seed: int, channels: int, tokens: int, groups: int
) -> None:
    """States and words of each stream are those of the definition."""
    rng = np.random.default_rng(seed)
    models = random_models(rng, 3)
    ids = rng.integers(0, 3, channels).astype(np.uint8)
    values = random_values(rng, models, ids, tokens)
    tables = Tables.of(models)
    symbols = rans.split(values, ids, models)[0]
    expected = [
        rans_ref.encode(symbols, part, ids, tables.frequencies)
        for part in rans.streams(tokens, groups)
    ]
    for name in levels():
        monkeypatch.setenv("KVSERVE_SIMD", name)
        coded = rans.encode_values(values, ids, tables, groups)
        for (states, words), made, written in zip(expected, coded.states, coded.words, strict=True):
            np.testing.assert_array_equal(made, states)
            np.testing.assert_array_equal(written, words)


@pytest.mark.parametrize("frequency", [1, 2, 3, 63, 64, 65, 2047, 2048, 2049, 4094, 4095])
@pytest.mark.parametrize("name", levels())
def test_extreme_frequencies(name: str, frequency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotients are exact for rare and for frequent symbols, over many states."""
    tables = Tables.of(
        [rans.Model(base=-1, low_bits=0, escape=False, frequencies=(frequency, 4096 - frequency))]
    )
    rng = np.random.default_rng(frequency)
    values = (rng.integers(0, 2, (16, 4096)) - 1).astype(np.int16)
    ids = np.zeros(16, np.uint8)
    monkeypatch.setenv("KVSERVE_SIMD", "numba")
    expected = pieces(rans.encode_values(values, ids, tables, 16))
    monkeypatch.setenv("KVSERVE_SIMD", name)
    coded = rans.encode_values(values, ids, tables, 16)
    assert pieces(coded) == expected
    np.testing.assert_array_equal(rans.decode_values(coded, ids, tables, 16, 4096), values)


@pytest.mark.parametrize("name", levels())
def test_a_wrong_end_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words cut off, added or altered, states altered and escapes missing or added are all found."""
    monkeypatch.setenv("KVSERVE_SIMD", name)
    rng = np.random.default_rng(5)
    values = np.rint(rng.laplace(size=(8, 200)) * 4).astype(np.int16)
    values[3, 100] = 9999
    ids = np.zeros(8, np.uint8)
    model = rans.Model(base=-8, low_bits=0, escape=True, frequencies=(*(240,) * 17, 16))
    tables = Tables.of([model])
    good = rans.encode_values(values, ids, tables, 2)
    first, *others = good.words
    altered = first.copy()
    altered[-1] ^= 1
    state = good.states[0].copy()
    state[7] += 1
    none = np.empty(0, np.uint16)
    for words, states, escapes in (
        ([first[:-1], *others], good.states, good.escapes),
        ([np.append(first, np.uint16(0)), *others], good.states, good.escapes),
        ([altered, *others], good.states, good.escapes),
        ([none, *others], good.states, good.escapes),
        ([none for _ in good.words], good.states, good.escapes),
        (good.words, [state, *good.states[1:]], good.escapes),
        (good.words, good.states, good.escapes[:-1]),
        (good.words, good.states, np.append(good.escapes, np.int16(0))),
    ):
        bad = Coded(states=states, planes=good.planes, words=words, escapes=escapes)
        assert rans.decode_values(bad, ids, tables, 2, 200) is None
    np.testing.assert_array_equal(rans.decode_values(good, ids, tables, 2, 200), values)


def test_threads_give_the_same() -> None:
    """Eight threads at once write what one writes."""
    rng = np.random.default_rng(6)
    inputs = [np.rint(rng.laplace(size=(64, 500)) * s).astype(np.int16) for s in range(1, 9)]

    def encode(values: NDArray[np.int16]) -> list[bytes]:
        ids = rans.assign(values, 4)
        return pieces(rans.encode_values(values, ids, Tables.of(rans.build(values, ids)), 4))

    alone = [encode(values) for values in inputs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, inputs * 4)) == alone * 4


def test_another_interpreter_without_a_library(tmp_path: Path) -> None:
    """Where the library is missing numba does the work, and the bytes are the same."""
    code = (
        "import pathlib, sys\n"
        "from kvserve_kernels.native import build\n"
        "if sys.argv[1] == 'missing':\n"
        "    build.library_path.__globals__['digest'] = lambda: 'none'\n"
        "import numpy as np\n"
        "from kvserve_kernels import rans\n"
        "from kvserve_kernels.native import simd\n"
        "values = (np.arange(4000).reshape(8, 500) % 7 - 3).astype(np.int16)\n"
        "ids = np.zeros(8, np.uint8)\n"
        "tables = rans.Tables.of(rans.build(values, ids))\n"
        "coded = rans.encode_values(values, ids, tables, 2)\n"
        "print(simd().name)\n"
        "print(*[w.tobytes().hex() for w in coded.words])\n"
    )
    outputs = {}
    for kind in ("missing", "there"):
        done = subprocess.run(
            [sys.executable, "-c", code, kind],
            env=os.environ | {"KVSERVE_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        outputs[kind] = done.stdout.split("\n", 1)
    assert outputs["missing"][0] == "NUMBA"
    assert outputs["there"][0] == levels()[-1].upper()
    assert outputs["missing"][1] == outputs["there"][1]
