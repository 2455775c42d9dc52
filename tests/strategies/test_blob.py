"""A blob is decoded exactly as it was made for whom it was made for, or refused with a reason."""

import dataclasses
import hashlib
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from tests.strategies.laws import PLAIN_PRESETS, bits, sample

from kvserve_api.errors import SpecError, StrategyError, WireError, WireReason
from kvserve_api.profile_set import NONE
from kvserve_api.strategy import Kind, Part, StrategyConfig
from kvserve_api.wire import (
    ALIGNMENT,
    MAX_HEADER_NBYTES,
    PREFIX_NBYTES,
    BlobHeader,
    BlobPrefix,
    KVLayout,
)
from kvserve_kernels.checksum import checksum
from kvserve_strategies import (
    PRESETS,
    DecodedBlob,
    Expectation,
    Pipeline,
    Place,
    decode_blob,
    encode_blob,
    max_blob_nbytes,
    peek_header,
)

FINGERPRINT = "sha256:" + "ab" * 32
LAYOUT = KVLayout(layers=6, kv_heads=2, head_dim=8, dtype="bfloat16")
LAYERS = range(2, 4)
TOKENS = range(16, 56)
EXPECT = Expectation(
    model_fingerprint=FINGERPRINT, layout=LAYOUT, layers=LAYERS, tokens=TOKENS, max_bytes=100_000
)
PRESET = pytest.mark.parametrize("name", PLAIN_PRESETS)


def make(name: str) -> tuple[torch.Tensor, torch.Tensor, bytes]:
    """Return keys, values and their blob."""
    keys, values = (sample("gauss", seed, (2, 40, 2, 8), torch.bfloat16) for seed in (1, 2))
    blob = encode_blob(
        Pipeline.of(PLAIN_PRESETS[name]),
        keys,
        values,
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        layers=LAYERS,
        tokens=TOKENS,
    )
    return keys, values, bytes(blob)


def same(a: DecodedBlob, b: DecodedBlob) -> bool:
    """Tell whether two decoded blobs hold the same bits."""
    return all(
        np.array_equal(bits(x), bits(y)) for x, y in ((a.keys, b.keys), (a.values, b.values))
    )


def reason(blob: bytes | bytearray, expect: Expectation = EXPECT) -> str:
    """Return why a blob is refused."""
    with pytest.raises(WireError) as caught:
        decode_blob(blob, expect=expect)
    return caught.value.reason


@PRESET
def test_blob(name: str) -> None:
    """A blob gives what its pipeline gives, and its header what it was made with; the payload is aligned."""
    keys, values, blob = make(name)
    pipeline = Pipeline.of(PLAIN_PRESETS[name])
    decoded = decode_blob(blob, expect=EXPECT)
    at = Place(first_layer=LAYERS.start, model_layers=LAYOUT.layers, first_token=TOKENS.start)
    payload = pipeline.encode(keys, values, at=at)
    direct = pipeline.decode(payload, shape=(2, 40, 2, 8), dtype=keys.dtype, at=at)
    assert np.array_equal(bits(decoded.keys), bits(direct[0]))
    assert np.array_equal(bits(decoded.values), bits(direct[1]))
    assert decoded.strategy_digest == PLAIN_PRESETS[name].digest
    prefix, header = peek_header(blob)
    assert header == BlobHeader(
        strategy=PLAIN_PRESETS[name],
        bundle=None,
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        layers=LAYERS,
        tokens=TOKENS,
    )
    assert prefix == BlobPrefix.parse(blob[:PREFIX_NBYTES])
    assert prefix.total_nbytes == len(blob)
    assert prefix.payload_offset % ALIGNMENT == 0
    assert prefix.header_nbytes <= MAX_HEADER_NBYTES
    assert len(blob) <= max_blob_nbytes(pipeline, layout=LAYOUT, layers=LAYERS, tokens=TOKENS)


@PRESET
def test_every_bit_is_protected(name: str) -> None:
    """Whichever single bit of a blob flips, it is refused."""
    blob = bytearray(make(name)[2])
    for at in range(len(blob)):
        blob[at] ^= 1 << at % 8
        reason(blob)
        blob[at] ^= 1 << at % 8
    decode_blob(blob, expect=EXPECT)


@PRESET
def test_every_cut_is_noticed(name: str) -> None:
    """A blob cut at any byte is refused, as is one with bytes after it."""
    blob = make(name)[2]
    for size in range(0, len(blob), 3):
        assert reason(blob[:size]) == WireReason.TRUNCATED
    assert reason(blob + b"\0") == WireReason.MALFORMED


@pytest.mark.parametrize(
    ("expect", "wanted"),
    [
        pytest.param(
            dataclasses.replace(EXPECT, model_fingerprint="sha256:" + "cd" * 32),
            WireReason.MODEL_MISMATCH,
            id="model",
        ),
        pytest.param(
            dataclasses.replace(EXPECT, layout=dataclasses.replace(LAYOUT, head_dim=16)),
            WireReason.LAYOUT_MISMATCH,
            id="layout",
        ),
        pytest.param(
            dataclasses.replace(EXPECT, layout=dataclasses.replace(LAYOUT, dtype="float16")),
            WireReason.LAYOUT_MISMATCH,
            id="dtype",
        ),
        pytest.param(
            dataclasses.replace(EXPECT, layers=range(3, 5)), WireReason.RANGE_MISMATCH, id="layers"
        ),
        pytest.param(
            dataclasses.replace(EXPECT, tokens=range(40)), WireReason.RANGE_MISMATCH, id="tokens"
        ),
        pytest.param(dataclasses.replace(EXPECT, max_bytes=500), WireReason.TOO_LARGE, id="size"),
    ],
)
def test_mismatches(expect: Expectation, wanted: WireReason) -> None:
    """A blob for somebody else is refused with the reason."""
    assert reason(make("kivi-4")[2], expect) == wanted


@pytest.mark.parametrize(
    ("at", "value", "wanted"),
    [
        pytest.param(0, b"HTTP", WireReason.BAD_MAGIC, id="magic"),
        pytest.param(4, b"\x02\0", WireReason.UNSUPPORTED_VERSION, id="version"),
        pytest.param(6, b"\x01\0", WireReason.MALFORMED, id="reserved"),
        pytest.param(8, b"\xff\xff\xff\xff", WireReason.MALFORMED, id="header length"),
        pytest.param(8, b"\0\0\0\0", WireReason.MALFORMED, id="no header"),
        pytest.param(12, b"\0\0\0\0", WireReason.CHECKSUM_MISMATCH, id="header checksum"),
        pytest.param(16, b"\xff" * 8, WireReason.CHECKSUM_MISMATCH, id="payload length"),
        pytest.param(24, bytes(8), WireReason.CHECKSUM_MISMATCH, id="payload checksum"),
        pytest.param(PREFIX_NBYTES, bytes(8), WireReason.CHECKSUM_MISMATCH, id="header"),
        pytest.param(-8, b"\xaa" * 8, WireReason.CHECKSUM_MISMATCH, id="payload"),
    ],
)
def test_altered_fields(at: int, value: bytes, wanted: WireReason) -> None:
    """Each field of the prefix has its check."""
    blob = bytearray(make("none")[2])
    at %= len(blob)
    blob[at : at + len(value)] = value
    assert reason(blob) == wanted


def forge(header: bytes, payload: bytes) -> bytes:
    """Return a blob of a given header body with true checksums."""
    head = struct.pack("<4sHHI", b"KVSB", 1, 0, len(header))
    tail = struct.pack("<QQ", len(payload), checksum(np.frombuffer(payload, np.uint8)))
    crc = zlib.crc32(header, zlib.crc32(head + bytes(4) + tail))
    return head + struct.pack("<I", crc) + tail + header + payload


def test_a_forged_header_is_refused() -> None:
    """True checksums don't help: strategy digest, JSON, ranges, padding and bundle are checked."""
    blob = make("none")[2]
    prefix = BlobPrefix.parse(blob)
    header, payload = blob[PREFIX_NBYTES : prefix.payload_offset], blob[prefix.payload_offset :]
    assert forge(header, payload) == blob

    def altered(at: int, value: bytes) -> bytes:
        return forge(header[:at] + value + header[at + len(value) :], payload)

    assert reason(altered(0, bytes(4))) == WireReason.STRATEGY_MISMATCH
    assert reason(altered(32, b"\x01")) == WireReason.BUNDLE_MISMATCH
    assert reason(altered(header.index(b"{"), b"[")) == WireReason.STRATEGY_MISMATCH
    assert reason(altered(len(header) - 1, b"\x01")) == WireReason.MALFORMED
    for layers in (b"\x04\0\x04\0", b"\x05\0\x04\0", b"\x02\0\xff\0"):
        assert reason(altered(104, layers)) == WireReason.MALFORMED


def test_an_unknown_stage_is_refused() -> None:
    """A strategy of a newer version, intact on the wire, is a mismatch and no crash."""
    blob = make("none")[2]
    prefix = BlobPrefix.parse(blob)
    header, payload = blob[PREFIX_NBYTES : prefix.payload_offset], blob[prefix.payload_offset :]
    start, end = header.index(b"{"), header.rindex(b"}") + 1
    text = header[start:end].replace(b"code.raw.v1", b"code.new.v9")
    body = hashlib.sha256(text).digest() + header[32:start] + text + header[end:]
    assert reason(forge(body, payload)) == WireReason.STRATEGY_MISMATCH


def test_an_unaligned_buffer_is_fine() -> None:
    """A blob anywhere in a larger buffer decodes alike."""
    blob = make("centred-rans")[2]
    expected = decode_blob(blob, expect=EXPECT)
    for offset in range(1, 9):
        buffer = bytearray(offset) + blob
        assert same(decode_blob(memoryview(buffer)[offset:], expect=EXPECT), expected)


def test_raw_tensors_share_the_buffer() -> None:
    """`none` copies nothing on decoding: writing to the buffer shows in the tensor."""
    buffer = bytearray(make("none")[2])
    decoded = decode_blob(buffer, expect=EXPECT)
    buffer[-2:] = b"\x80\x3f"
    assert float(decoded.values[-1, -1, -1, -1]) == 1.0


def test_wrong_tensors_are_refused() -> None:
    """Tensors that are not what layout and ranges say are an error of the caller."""
    keys, values, _ = make("none")
    pipeline = Pipeline.of(PLAIN_PRESETS["none"])
    with pytest.raises(SpecError, match="keys"):
        encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint=FINGERPRINT,
            layout=LAYOUT,
            layers=range(1),
            tokens=TOKENS,
        )
    with pytest.raises(SpecError, match="layers"):
        encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint=FINGERPRINT,
            layout=LAYOUT,
            layers=range(5, 7),
            tokens=TOKENS,
        )
    with pytest.raises(SpecError, match="model_fingerprint"):
        encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint="smollm2",
            layout=LAYOUT,
            layers=LAYERS,
            tokens=TOKENS,
        )


def mutate(rng: random.Random, blob: bytes, others: list[bytes]) -> bytes:
    """Return a blob cut, flipped, spliced, overwritten or repeated."""
    data = bytearray(blob)
    match rng.randrange(5):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            other = rng.choice(others)
            data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
        case 3:
            at, size = rng.randrange(len(data)), rng.randint(1, 32)
            data[at : at + size] = rng.randbytes(size)
        case 4:
            at = rng.randrange(len(data))
            data[at:at] = data[max(0, at - rng.randint(1, 64)) : at]
    return bytes(data)


@pytest.mark.slow
def test_fuzz_blobs() -> None:
    """Of 50,000 mutated blobs each is refused with a reason or gives the exact result."""
    rng = random.Random(0)
    blobs = [make(name)[2] for name in PLAIN_PRESETS]
    exact = [decode_blob(blob, expect=EXPECT) for blob in blobs]
    refused = 0
    for _ in range(50_000):
        mutant = mutate(rng, rng.choice(blobs), blobs)
        try:
            decoded = decode_blob(mutant, expect=EXPECT)
        except WireError:
            refused += 1
            continue
        assert any(same(decoded, one) for one in exact)
    assert refused > 49_000


BYTES_LAYOUT = KVLayout(layers=9, kv_heads=4, head_dim=6, dtype="uint8")


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_carried_as_they_are_or_refused(name: str) -> None:
    """A cache that is no numbers to us comes through raw bit by bit; every strategy that computes refuses it."""
    generator = torch.Generator().manual_seed(4)
    shape = (3, 5, 4, 6)
    keys, values = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(2)
    )
    # in the midst of the model: some peers keep its ends as they are
    layers, tokens = range(3, 6), range(7, 12)
    pipeline = Pipeline.of(PRESETS[name])

    def encode() -> memoryview:
        return encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint=FINGERPRINT,
            layout=BYTES_LAYOUT,
            layers=layers,
            tokens=tokens,
        )

    if not pipeline.takes_bytes:
        with pytest.raises(StrategyError, match=r"holds only bytes|bundle"):
            encode()
        return
    assert name == NONE
    blob = encode()
    expect = dataclasses.replace(EXPECT, layout=BYTES_LAYOUT, layers=layers, tokens=tokens)
    decoded = decode_blob(blob, expect=expect)
    assert torch.equal(decoded.keys, keys)
    assert torch.equal(decoded.values, values)
    assert len(blob) <= max_blob_nbytes(pipeline, layout=BYTES_LAYOUT, layers=layers, tokens=tokens)


def ends_apart(last: int) -> StrategyConfig:
    """Return a strategy of 4 bits that sends the last tokens as they are."""
    raw, levels = PRESETS[NONE].parts[0].chain, PRESETS["int4-token"].parts[0].chain
    return StrategyConfig(
        parts=(
            Part(kind="kv", chain=raw, tokens=f"-{last}:"),
            Part(kind="kv", chain=levels),
        )
    )


@pytest.mark.parametrize("cuts", [(40,), (20, 40), (16, 32, 40), (35, 40), (1, 2, 38, 40)], ids=str)
def test_a_requests_last_tokens_are_those_of_its_end(cuts: tuple[int, ...]) -> None:
    """However a request is cut into pieces, exactly the last 12 tokens of it are kept as they are."""
    keys, values = (sample("gauss", seed, (6, 40, 2, 8), torch.bfloat16) for seed in (1, 2))
    pipeline = Pipeline.of(ends_apart(12))
    exact: list[bool] = []
    for start, stop in zip((0, *cuts), cuts, strict=False):
        piece = (keys[:, start:stop], values[:, start:stop])
        blob = encode_blob(
            pipeline,
            *piece,
            model_fingerprint=FINGERPRINT,
            layout=LAYOUT,
            layers=range(6),
            tokens=range(start, stop),
            tokens_after=40 - stop,
        )
        expect = dataclasses.replace(EXPECT, layers=range(6), tokens=range(start, stop))
        decoded = decode_blob(blob, expect=expect)
        exact += [torch.equal(decoded.keys[:, t], piece[0][:, t]) for t in range(stop - start)]
    assert exact == [False] * 28 + [True] * 12


def test_a_strategy_that_needs_its_ends_keeps_them() -> None:
    """Where the parts after the last tokens' would cover nothing without it, each piece keeps its own last tokens."""
    raw = PRESETS[NONE].parts[0].chain
    config = StrategyConfig(
        parts=(
            Part(kind=Kind.KEYS, chain=raw, tokens="-4:"),
            Part(kind="kv", chain=raw),
            Part(kind=Kind.KEYS, chain=raw),
            Part(kind=Kind.VALUES, chain=raw),
        )
    )
    assert config.before(3).parts[0].tokens == "-1:"
    assert config.before(100) is config
    assert config.before(0) is config
