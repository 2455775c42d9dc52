"""What a producer answers: read as it was written, and nothing else is accepted."""

import json
import struct
import zlib
from dataclasses import replace

import pytest

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.chunks import Chunk
from kvserve_connector.pieces import Offer
from kvserve_connector.protocol import HEADER_BYTES, Kind, pack_message, parse_header, parse_message
from kvserve_connector.replies import Accept, End, Part, Refuse
from transfer_messages import ACCEPT

REPLIES = {
    "accept": ACCEPT,
    "accept-of-parts": replace(
        ACCEPT,
        chunks=(
            Chunk(layers=range(2), tokens=range(3)),
            Chunk(layers=range(1), tokens=range(1, 2), part=7),
        ),
    ),
    "accept-without-table": replace(ACCEPT, version=None),
    "accept-by-nixl": replace(ACCEPT, nixl=Offer(agent="a", metadata=b"\x00\xff")),
    "end": End(encode_s=0.5, goodput_bytes_per_s=1e8),
    "end-of-a-transfer": End(
        encode_s=0.5, goodput_bytes_per_s=1e8, waited_s=2.0, model_s=3.0, prefill_s=2.5
    ),
    "end-of-parts": End(
        encode_s=0.5,
        goodput_bytes_per_s=1e8,
        parts={"none": Part(3000, 3100), "int4-token": Part(4000, 1100)},
    ),
    "end-that-wishes-for-a-probe": End(encode_s=0.5, goodput_bytes_per_s=1e8, probe=True),
    "refuse": Refuse(reason="Expired", detail="too late"),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_replies_come_back(reply: Accept | End | Refuse) -> None:
    """Every reply is read as it was written."""
    frame = reply.pack()
    header = parse_header(frame[:HEADER_BYTES])
    assert header.length == len(frame) - HEADER_BYTES
    assert type(reply).parse(frame[HEADER_BYTES:]) == reply


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("profile", "no name", id="profile"),
        pytest.param("predicted_s", -1, id="negative"),
        pytest.param("version", "7", id="version"),
        pytest.param("chunks", [[0, 1, 0]], id="three-bounds"),
        pytest.param("chunks", [[0, 1, 0, 1, 1025]], id="part"),
        pytest.param("chunks", [[0, 1 << 16, 0, 1]], id="layers"),
        pytest.param("nixl", {"agent": "a", "metadata": "?"}, id="metadata"),
        pytest.param("surprise", 1, id="unknown"),
        pytest.param("pod", None, id="missing"),
    ],
)
def test_wrong_promises_are_refused(key: str, value: object) -> None:
    """An ACCEPT with anything wrong in it is refused as malformed."""
    content = parse_message(ACCEPT.pack()[HEADER_BYTES:]) | {key: value}
    with pytest.raises(WireError) as caught:
        Accept.parse(pack_message(Kind.ACCEPT, content)[HEADER_BYTES:])
    assert caught.value.reason == WireReason.MALFORMED


@pytest.mark.parametrize("prefill_s", [-1, "1", 1e400])
def test_wrong_times_are_refused(prefill_s: object) -> None:
    """A prefill whose time is no number of seconds makes an END malformed."""
    frame = End(encode_s=0.5, goodput_bytes_per_s=1e8, prefill_s=2.5).pack()
    content = parse_message(frame[HEADER_BYTES:]) | {"prefill_s": prefill_s}
    body = json.dumps(content).replace("Infinity", "1e400").encode()
    with pytest.raises(WireError) as caught:
        End.parse(struct.pack("<I", zlib.crc32(body)) + body)
    assert caught.value.reason == WireReason.MALFORMED


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([["none", 1, 1]], id="list"),
        pytest.param({"no name": [1, 1]}, id="name"),
        pytest.param({"none": [1]}, id="one-number"),
        pytest.param({"none": [1, True]}, id="boolean"),
        pytest.param({"none": [0, 1]}, id="nothing"),
        pytest.param({"none": [1, 1 << 60]}, id="huge"),
        pytest.param({f"p{n}": [1, 1] for n in range(17)}, id="too-many"),
    ],
)
def test_wrong_parts_are_refused(parts: object) -> None:
    """Parts that are not bytes by profile make an END malformed."""
    frame = End(encode_s=0.5, goodput_bytes_per_s=1e8).pack()
    content = parse_message(frame[HEADER_BYTES:]) | {"parts": parts}
    with pytest.raises(WireError) as caught:
        End.parse(pack_message(Kind.END, content)[HEADER_BYTES:])
    assert caught.value.reason == WireReason.MALFORMED
