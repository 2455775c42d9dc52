"""The bytes of ``code.ladder.v1``."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve_api.errors import WireError
from kvserve_kernels.native import Simd, coder
from kvserve_strategies.ladder import coded_nbytes, decode_levels, encode_levels
from kvserve_strategies.stage import Form, Spec
from kvserve_strategies.stages.ladder import Ladder

SPREADS = [0.0, 0.05, 1.0, 30.0, 20_000.0]


def choices() -> list[str]:
    """Return who can do the work on this machine."""
    library = coder()
    widest = -1 if library is None else library.kvserve_widest()
    return [level.name.lower() for level in Simd if level <= widest]


@pytest.fixture(autouse=True)
def clean_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without a choice of who does the work."""
    monkeypatch.setenv("KVSERVE_SIMD", "")


def joined(pieces: tuple[NDArray[Any], ...]) -> NDArray[np.uint8]:
    """Return a section as it is sent."""
    return np.frombuffer(bytearray(b"".join(piece.tobytes() for piece in pieces)), np.uint8)


def sample(seed: int, channels: int, tokens: int, spread: float) -> NDArray[np.int16]:
    """Return levels whose spread falls from channel to channel, down to zeros."""
    rng = np.random.default_rng(seed)
    falling = spread * 2.0 ** np.linspace(0, -10, channels)[:, None]
    wide = np.rint(rng.laplace(size=(channels, tokens)) * falling)
    return wide.clip(-32768, 32767).astype(np.int16)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.integers(1, 60),
    tokens=st.integers(1, 300),
    spread=st.sampled_from(SPREADS),
)
def test_round_trip(
    monkeypatch: pytest.MonkeyPatch, seed: int, channels: int, tokens: int, spread: float
) -> None:
    """Levels come back, within the bound, and whoever does the work writes the same bytes."""
    levels = sample(seed, channels, tokens, spread)
    sections = set()
    for name in choices():
        monkeypatch.setenv("KVSERVE_SIMD", name)
        section = joined(encode_levels(levels))
        assert section.size <= coded_nbytes(levels.size)
        np.testing.assert_array_equal(decode_levels(section, channels, tokens), levels)
        sections.add(section.tobytes())
    assert len(sections) == 1


def test_bytes_never_change() -> None:
    """The section of levels made by integer arithmetic is the recorded one: one byte format for ever."""
    noise = (np.arange(40 * 300, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).reshape(40, 300)
    bits = [(noise >> np.uint64(20 + i)) & np.uint64(1) for i in range(30)]
    bell = sum(bit.astype(np.int64) for bit in bits) - 15
    levels = (bell * np.arange(40, 0, -1)[:, None] ** 2 // 256).astype(np.int16)
    levels[7, 11] = -32_768
    section = joined(encode_levels(levels))
    assert (
        hashlib.sha256(section.tobytes()).hexdigest()
        == "7a72befb9166a88cee2d07e5e5fe35574d063a36381c1b253293ad14dae29e72"
    )


def test_zeros_are_a_head() -> None:
    """Levels that are all zero take twelve bytes."""
    section = joined(encode_levels(np.zeros((300, 1000), np.int16)))
    assert section.size == 12
    assert not decode_levels(section, 300, 1000).any()


def test_streams_are_long() -> None:
    """A piece has at most one stream for 128 tokens, each of 131,072 coded symbols if there are so many."""
    for channels, tokens, streams in (
        (1152, 1024, 8),
        (512, 1024, 4),
        (64, 1024, 1),
        (4000, 100, 1),
    ):
        levels = sample(1, channels, tokens, 2.0)
        levels[:, 0] = 1
        head = joined(encode_levels(levels))[:12].tobytes()
        groups = int.from_bytes(head[2:4], "little")
        assert -(-tokens // (32 * groups)) == streams


def test_threads_give_the_same() -> None:
    """Eight threads at once write what one writes."""
    inputs = [sample(seed, 100, 700, 3.0) for seed in range(8)]
    alone = [joined(encode_levels(levels)).tobytes() for levels in inputs]
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda levels: joined(encode_levels(levels)).tobytes(), inputs * 4)
    assert list(made) == alone * 4


@pytest.mark.parametrize("levels", [None, 2, 12, 256])
def test_stage(levels: int | None) -> None:
    """The stage takes levels by token, writes them by channel, and gives them back."""
    rng = np.random.default_rng(4)
    spec = Spec(
        form=Form.LEVELS,
        layers=2,
        tokens=77,
        kv_heads=3,
        head_dim=5,
        dtype="bfloat16",
        levels=levels,
    )
    value = rng.integers(0, levels or 90, spec.shape).astype(spec.array_dtype)
    stage = Ladder()
    section = joined(stage.encode(value, spec).section)
    assert section.size <= stage.encoded_nbytes(spec)
    np.testing.assert_array_equal(stage.decode(section, None, spec), value)
    by_channel = value.astype(np.int16).transpose(0, 2, 3, 1).reshape(30, 77) - (levels or 0) // 2
    direct = encode_levels(np.ascontiguousarray(by_channel))
    np.testing.assert_array_equal(section, joined(direct))


def test_levels_that_the_spec_excludes() -> None:
    """A level at or above the spec's number is refused."""
    wide = Spec(
        form=Form.LEVELS, layers=1, tokens=9, kv_heads=1, head_dim=4, dtype="float16", levels=9
    )
    narrow = Spec(
        form=Form.LEVELS, layers=1, tokens=9, kv_heads=1, head_dim=4, dtype="float16", levels=8
    )
    value = np.full(wide.shape, 8, np.uint8)
    section = joined(Ladder().encode(value, wide).section)
    with pytest.raises(WireError, match="a level is not one of 8"):
        Ladder().decode(section, None, narrow)


@pytest.mark.parametrize("spread", SPREADS[1:])
def test_every_cut_is_an_error(spread: float) -> None:
    """A section cut anywhere, or with a byte added, is refused."""
    section = joined(encode_levels(sample(2, 40, 100, spread)))
    for size in [*range(0, section.size, max(1, section.size // 200)), section.size - 1]:
        with pytest.raises(WireError):
            decode_levels(section[:size], 40, 100)
    with pytest.raises(WireError):
        decode_levels(np.append(section, np.uint8(0)), 40, 100)


@pytest.mark.parametrize("name", choices())
def test_spoiled_sections(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes flipped or replaced give an error or levels of the right shape, never anything else."""
    monkeypatch.setenv("KVSERVE_SIMD", name)
    rng = np.random.default_rng(3)
    sections = [joined(encode_levels(sample(3, 20, 90, spread))) for spread in SPREADS]
    refused = 0
    for at in range(2000):
        section = sections[at % len(sections)].copy()
        for _ in range(int(rng.integers(1, 4))):
            # mostly in the head and the table numbers, where it hurts
            where = min(int(rng.exponential(60)), section.size - 1)
            section[where] = rng.integers(0, 256)
        try:
            levels = decode_levels(section, 20, 90)
        except WireError:
            refused += 1
        else:
            assert levels.shape == (20, 90)
            assert levels.dtype == np.int16
    assert refused > 1000
