"""Plans of chunks: ours cover what was asked for, and foreign ones that do not are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_api.errors import WireError, WireReason
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import MAX_CHUNK_BYTES, Chunk, check_cover, plan, plan_ahead
from kvserve_connector.form import Form, Part
from kvserve_connector.groups import Group
from kvserve_connector.replies import MAX_CHUNKS


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 90),
    heads=st.integers(1, 16),
    start=st.integers(0, 300),
    tokens=st.integers(1, 20_000),
    chunk_layers=st.integers(1, 100),
    multiple=st.integers(1, 40),
)
def test_plans_cover_what_was_asked(
    layers: int, heads: int, start: int, tokens: int, chunk_layers: int, multiple: int
) -> None:
    """Our own plans pass the check that foreign ones must pass, and cut no group of layers that belongs together."""
    layout = KVLayout(layers=layers, kv_heads=heads, head_dim=128, dtype="bfloat16")
    wanted = range(start, start + tokens)
    chunks = plan(layout, wanted, chunk_layers, layer_multiple=multiple)
    check_cover(chunks, layout, wanted)
    assert max(len(chunk.layers) for chunk in chunks) <= max(chunk_layers, multiple)
    for chunk in chunks:
        assert chunk.layers.start % multiple == 0
        assert chunk.layers.stop % multiple == 0 or chunk.layers.stop == layers


def test_many_layers_make_short_chunks() -> None:
    """Where layers that belong together fill a chunk with few tokens, the cuts fall on the lanes of the coders."""
    layout = KVLayout(layers=80, kv_heads=32, head_dim=128, dtype="bfloat16")
    chunks = plan(layout, range(500), 5, layer_multiple=10)
    # 10 layers of a token take 160 KiB: 51 tokens fit
    assert {len(chunk.tokens) for chunk in chunks} == {32, 500 % 32}
    assert all(chunk.native_bytes(layout) <= MAX_CHUNK_BYTES for chunk in chunks)


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 90),
    tokens=st.integers(1, 200_000),
    multiple=st.integers(1, 10),
    step_tokens=st.integers(1, 16_384),
)
def test_plans_of_running_prefills_are_fine_and_finite(
    layers: int, tokens: int, multiple: int, step_tokens: int
) -> None:
    """They cover what was asked, leave a small part for the end, and fit into a message."""
    layout = KVLayout(layers=layers, kv_heads=2, head_dim=128, dtype="bfloat16")
    group = Group(index=0, layer_names=("a",), block_tokens=16)
    form = Form(fingerprint="f", parts=(Part(layout=layout, group=group, block_rows=16),))
    chunks = plan_ahead(form, range(tokens), 5, layer_multiple=multiple, step_tokens=step_tokens)
    check_cover(chunks, layout, range(tokens))
    assert len(chunks) <= MAX_CHUNKS
    assert max(len(chunk.layers) for chunk in chunks) <= max(multiple, -(-layers // 12))
    assert max(len(chunk.tokens) for chunk in chunks) <= max(1024, tokens // 256 + 128)


WANTED = range(40)
SMALL = KVLayout(layers=4, kv_heads=1, head_dim=16, dtype="bfloat16")


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([], id="nothing"),
        pytest.param([(0, 4, 0, 39)], id="token-missing"),
        pytest.param([(0, 3, 0, 40)], id="layer-missing"),
        pytest.param([(0, 5, 0, 40)], id="layer-too-many"),
        pytest.param([(0, 4, 0, 41)], id="token-too-many"),
        pytest.param([(0, 2, 0, 40), (0, 2, 0, 40)], id="doubled-instead-of-rest"),
        pytest.param([(0, 4, 0, 20), (0, 4, 10, 30)], id="overlap"),
        pytest.param([(0, 4, 0, 20), (0, 2, 20, 40), (2, 4, 20, 30)], id="ragged"),
        pytest.param([(0, 4, 0, 40), (0, 4, 0, 40)], id="twice"),
    ],
)
def test_false_plans_are_refused(chunks: list[tuple[int, int, int, int]]) -> None:
    """A plan that leaves something out, doubles it or goes beyond is refused."""
    made = [Chunk(layers=range(a, b), tokens=range(c, d)) for a, b, c, d in chunks]
    with pytest.raises(WireError) as caught:
        check_cover(made, SMALL, WANTED)
    assert caught.value.reason == WireReason.RANGE_MISMATCH


def test_unbounded_chunks_are_refused() -> None:
    """A plan with one chunk for everything can't make a consumer take it all at once."""
    big = KVLayout(layers=80, kv_heads=8, head_dim=128, dtype="bfloat16")
    with pytest.raises(WireError) as caught:
        check_cover([Chunk(layers=range(80), tokens=range(4000))], big, range(4000))
    assert caught.value.reason == WireReason.TOO_LARGE
