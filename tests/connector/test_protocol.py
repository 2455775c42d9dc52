"""Frames and the form of control messages: what is sent is read, and nothing else is accepted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.commands import Pull
from kvserve_connector.protocol import (
    HEADER_BYTES,
    Kind,
    pack_header,
    pack_message,
    parse_header,
    parse_message,
)
from kvserve_connector.replies import MAX_CHUNKS, Accept
from transfer_messages import ACCEPT, PULL


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


def _read(frame: bytes) -> Accept:
    header = parse_header(frame[:HEADER_BYTES])
    if header.kind != Kind.ACCEPT or header.length != len(frame) - HEADER_BYTES:
        raise WireError(WireReason.MALFORMED, "another frame")
    return Accept.parse(frame[HEADER_BYTES:])
