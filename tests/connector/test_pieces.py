"""Words about pieces of chunks: read as they were written, and of their own transfer only."""

import pytest

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.pieces import pack_staged, pack_taken, parse_staged, parse_taken
from kvserve_connector.protocol import HEADER_BYTES, Kind, parse_header


def test_pieces_come_back() -> None:
    """Where a piece is, and how long reading it took, is read as it was written."""
    frame = pack_staged(7, (1 << 64) - 1, (1 << 32) - 1, seed=9)
    header = parse_header(frame[:HEADER_BYTES], 9)
    assert (header.kind, header.index, header.length) == (Kind.STAGED, 7, len(frame) - HEADER_BYTES)
    assert parse_staged(frame[HEADER_BYTES:], 9) == ((1 << 64) - 1, (1 << 32) - 1)
    frame = pack_taken(7, 1.25)
    header = parse_header(frame[:HEADER_BYTES])
    assert (header.kind, header.index, header.length) == (Kind.TAKEN, 7, len(frame) - HEADER_BYTES)
    assert parse_taken(frame[HEADER_BYTES:]) == 1.25


def test_pieces_of_other_transfers_are_refused() -> None:
    """A piece of another transfer, a damaged one and one cut short are typed errors."""
    body = pack_staged(7, 4096, 100, seed=9)[HEADER_BYTES:]
    with pytest.raises(WireError) as caught:
        parse_staged(body, 8)
    assert caught.value.reason == WireReason.CHECKSUM_MISMATCH
    with pytest.raises(WireError) as caught:
        parse_staged(bytes([body[0] ^ 1]) + body[1:], 9)
    assert caught.value.reason == WireReason.CHECKSUM_MISMATCH
    with pytest.raises(WireError) as caught:
        parse_staged(body[:-1], 9)
    assert caught.value.reason == WireReason.TRUNCATED
    with pytest.raises(WireError) as caught:
        parse_taken(b"")
    assert caught.value.reason == WireReason.TRUNCATED
