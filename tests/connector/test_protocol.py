"""Frames and control messages: what is sent is read, and nothing else is accepted."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_api.errors import WireError, WireReason
from kvserve_api.table import Version
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import MAX_CHUNK_BYTES, Chunk, check_cover, plan, plan_ahead
from kvserve_connector.form import Form, Part
from kvserve_connector.groups import Group
from kvserve_connector.protocol import (
    HEADER_BYTES,
    MAX_CHUNKS,
    Accept,
    End,
    Kind,
    Pull,
    Refuse,
    Release,
    Renew,
    pack_header,
    pack_message,
    parse_header,
    parse_message,
)

LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
PULL = Pull(
    engine_id="e",
    request_id="r",
    tokens=range(128, 1000),
    prompt_digest="d" * 32,
    fingerprint="sha256:" + "a" * 64,
    layout=LAYOUT,
    stages=frozenset({"code.raw.v1", "code.rans.v1"}),
    budget_s=7.5,
    traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
)
ACCEPT = Accept(
    profile="int4-token",
    wanted="none",
    bound="Goal",
    predicted_s=0.25,
    version=Version(epoch=7, counter=9),
    pod="prefill-0",
    model_s=1.5,
    chunks=plan(LAYOUT, range(128, 1000), 5),
)
MESSAGES = {
    "pull": PULL,
    "pull-with-bundles": replace(PULL, bundles=frozenset({"sha256:" + "b" * 64})),
    "pull-of-a-busy-engine": replace(PULL, decode_delays=2.5),
    "pull-of-whole-blocks": replace(
        PULL, blocks="sha256:" + "c" * 64, layout=replace(LAYOUT, dtype="uint8")
    ),
    "accept": ACCEPT,
    "accept-of-parts": replace(
        ACCEPT,
        chunks=(
            Chunk(layers=range(2), tokens=range(3)),
            Chunk(layers=range(1), tokens=range(1, 2), part=7),
        ),
    ),
    "pull-of-a-transfer": replace(PULL, transfer=True, engine_id=""),
    "pull-of-a-worker": replace(PULL, rank=1, ranks=2),
    "end": End(encode_s=0.5, goodput_bytes_per_s=1e8),
    "end-of-a-transfer": End(encode_s=0.5, goodput_bytes_per_s=1e8, waited_s=2.0, model_s=3.0),
    "refuse": Refuse(reason="Expired", detail="too late"),
    "release": Release(engine_id="e", request_id="r"),
    "release-of-a-transfer": Release(engine_id="", request_id="x", transfer=True),
    "renew": Renew(names=("r", "x")),
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_messages_come_back(message: Pull | Accept | End | Refuse | Release | Renew) -> None:
    """Every control message is read as it was written."""
    frame = message.pack()
    header = parse_header(frame[:HEADER_BYTES])
    assert header.length == len(frame) - HEADER_BYTES
    assert type(message).parse(frame[HEADER_BYTES:]) == message


def test_absent_values_stay_absent() -> None:
    """A transfer without trace and table is read as such."""
    pull = replace(PULL, traceparent=None)
    assert Pull.parse(pull.pack()[HEADER_BYTES:]) == pull
    accept = replace(ACCEPT, version=None)
    assert Accept.parse(accept.pack()[HEADER_BYTES:]) == accept


@settings(max_examples=300, deadline=None)
@given(bit=st.integers(0, 8 * len(ACCEPT.pack()) - 1))
def test_no_flipped_bit_passes(bit: int) -> None:
    """Any single flipped bit, in header or body, is a typed error."""
    frame = bytearray(ACCEPT.pack())
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        _read(bytes(frame))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=64))
def test_noise_is_refused(data: bytes) -> None:
    """Random bytes are a typed error as header and as message."""
    with pytest.raises(WireError):
        parse_header(data)
    with pytest.raises(WireError):
        parse_message(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("tokens", [5, 5], id="empty-range"),
        pytest.param("tokens", [0, 1 << 40], id="huge-range"),
        pytest.param("tokens", [True, 9], id="boolean"),
        pytest.param("budget_s", -1, id="negative"),
        pytest.param("decode_delays", -1, id="negative-delay"),
        pytest.param("stages", ["x" * 65], id="long-stage"),
        pytest.param("stages", [3], id="stage-number"),
        pytest.param("bundles", ["sha256:1"], id="short-digest"),
        pytest.param("bundles", ["sha256:" + "b" * 64] * 65, id="too-many-bundles"),
        pytest.param("layout", {"layers": 0, "kv_heads": 1, "head_dim": 1, "dtype": "float32"}, id="layers"),
        pytest.param("request_id", "r" * 513, id="long-id"),
        pytest.param("surprise", 1, id="unknown"),
        pytest.param("engine_id", None, id="missing"),
    ],
)  # fmt: skip
def test_wrong_wishes_are_refused(key: str, value: object) -> None:
    """A PULL with anything wrong in it is refused as malformed."""
    content = parse_message(PULL.pack()[HEADER_BYTES:]) | {key: value}
    with pytest.raises(WireError) as caught:
        Pull.parse(pack_message(Kind.PULL, content)[HEADER_BYTES:])
    assert caught.value.reason == WireReason.MALFORMED


def test_a_consumer_without_bundles_speaks_of_none() -> None:
    """Producers that know no bundles, or no opaque caches, understand consumers that have none."""
    content = parse_message(PULL.pack()[HEADER_BYTES:])
    assert "bundles" not in content
    assert "blocks" not in content


def test_another_protocol_is_refused() -> None:
    """A peer of another protocol version is told so."""
    content = parse_message(PULL.pack()[HEADER_BYTES:]) | {"protocol": 2}
    with pytest.raises(WireError) as caught:
        Pull.parse(pack_message(Kind.PULL, content)[HEADER_BYTES:])
    assert caught.value.reason == WireReason.UNSUPPORTED_VERSION


def test_nothing_is_pickled() -> None:
    """A message's body is JSON and nothing else."""
    assert json.loads(PULL.pack()[HEADER_BYTES + 4 :])["request_id"] == "r"


def test_header_says_which_chunk_follows() -> None:
    """A chunk's place in the plan is in its header, up to the longest plan."""
    assert parse_header(pack_header(Kind.CHUNK, 5, MAX_CHUNKS - 1)).index == MAX_CHUNKS - 1
    assert parse_header(pack_header(Kind.PULL, 5)).index == 0


def test_header_length_is_32_bits() -> None:
    """The largest length survives the header; whoever reads it must bound it."""
    assert parse_header(pack_header(Kind.CHUNK, 2**32 - 1)).length == 2**32 - 1


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


def _read(frame: bytes) -> Accept:
    header = parse_header(frame[:HEADER_BYTES])
    if header.kind != Kind.ACCEPT or header.length != len(frame) - HEADER_BYTES:
        raise WireError(WireReason.MALFORMED, "another frame")
    return Accept.parse(frame[HEADER_BYTES:])
