"""The bytes between a consumer and a producer: small control messages and coded chunks, in frames.

A frame is a header of 16 bytes, ``magic(4) kind(1) reserved(1) index(2) length(4) crc32 of what precedes(4)``,
little-endian, and a body of ``length`` bytes. A control message's body is JSON, preceded by its own CRC-32; a chunk's
body is a self-describing blob with checksums of its own. Over one connection, one transfer after the other:

    consumer                      producer
    PULL {what, who I am}   →
                            ←     WAIT  (once a second, whenever the prefill is not so far)
                            ←     ACCEPT {profile, plan}   or   REFUSE {reason, detail}
                            ←     CHUNK blob  (as often as the plan says)
                            ←     END {times, link}        or   REFUSE
    DONE                    →     the blocks are free
    RELEASE {what}          →     (instead of PULL: nobody will fetch this)
    RENEW {what}            →     (likewise: these will be fetched, keep them)
    PROBE                   →     (after an END that wishes for it, see `kvserve_connector.probing`)
                            ←     PADDING bytes, and at the end PADDING without any
    DONE                    →

Where both sides have NIXL, the bytes of chunks do not come over the connection (`kvserve_connector.staged`): in place
of each CHUNK there are

                            ←     STAGED {where, how many}  (for each piece of it)
    TAKEN {seconds}         →     the piece's room is free

A PULL that names a transfer may come before its prefill has ended. Its chunks come in any order; their headers say
which they are.

With credentials, HELLO, CHALLENGE and PROOF come before all that; see `kvserve_connector.handshake`.
"""

import json
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from kvserve_api.errors import WireError, WireReason
from kvserve_api.fields import Fields

MAGIC: Final = b"KVT1"
HEADER: Final = struct.Struct("<4sBxHII")
HEADER_BYTES: Final = HEADER.size
MAX_MESSAGE_BYTES: Final = 1 << 20
PROTOCOL: Final = 1
_CRC = struct.Struct("<I")


class Kind(IntEnum):
    """What a frame holds."""

    PULL = 1
    ACCEPT = 2
    REFUSE = 3
    CHUNK = 4
    END = 5
    DONE = 6
    RELEASE = 7
    WAIT = 8
    RENEW = 9
    STAGED = 10
    TAKEN = 11
    PROBE = 12
    PADDING = 13
    HELLO = 16
    CHALLENGE = 17
    PROOF = 18


_OF_TRANSFER: Final = frozenset({Kind.CHUNK, Kind.STAGED})
"""Frames whose checksum begins with that of the PULL they answer."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A checked frame header: what follows, how many bytes of it, and of a chunk its place in the plan."""

    kind: Kind
    length: int
    index: int = 0


def pack_header(kind: Kind, length: int, index: int = 0, *, seed: int = 0) -> bytes:
    """Return a frame's header.

    Args:
        kind: What the frame holds.
        length: Bytes that follow.
        index: Of a chunk: its place in the plan.
        seed: Of a chunk: what its checksum begins with, see `kvserve_connector.frames.FrameSocket.bind`.
    """
    head = HEADER.pack(MAGIC, kind, index, length, 0)[: -_CRC.size]
    return head + _CRC.pack(zlib.crc32(head, seed))


def parse_header(data: bytes, seed: int = 0) -> FrameHeader:
    """Check a frame's header; the length is not yet checked against any bound.

    Args:
        data: Its bytes.
        seed: What the checksum of a chunk's header must begin with.

    Raises:
        WireError: It is not a header of ours, or damaged.
    """
    if len(data) != HEADER_BYTES:
        raise WireError(WireReason.TRUNCATED, f"a frame header has {HEADER_BYTES} bytes")
    magic, kind, index, length, crc = HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError(WireReason.BAD_MAGIC, f"a frame starts with {MAGIC!r}, got {magic!r}")
    if crc != zlib.crc32(data[: -_CRC.size], seed if kind in _OF_TRANSFER else 0):
        raise WireError(
            WireReason.CHECKSUM_MISMATCH, "a frame header is damaged, or of another transfer"
        )
    try:
        return FrameHeader(Kind(kind), length, index)
    except ValueError as error:
        raise WireError(WireReason.UNSUPPORTED_VERSION, f"no frame has kind {kind}") from error


def pack_message(kind: Kind, value: dict[str, Any]) -> bytes:
    """Return the whole frame of a control message."""
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return pack_header(kind, len(body) + _CRC.size) + _CRC.pack(zlib.crc32(body)) + body


def parse_message(body: bytes) -> Any:
    """Return the JSON of a control message's body.

    Raises:
        WireError: It is damaged or not JSON.
    """
    if len(body) < _CRC.size:
        raise WireError(WireReason.TRUNCATED, "a control message is too short")
    if _CRC.unpack_from(body)[0] != zlib.crc32(body[_CRC.size :]):
        raise WireError(WireReason.CHECKSUM_MISMATCH, "a control message is damaged")
    try:
        return json.loads(body[_CRC.size :])
    except (ValueError, RecursionError) as error:
        raise WireError(WireReason.MALFORMED, f"a control message is not JSON: {error}") from error


def read_fields(body: bytes) -> Fields:
    """Return the fields of a control message's body.

    Raises:
        WireError: It is damaged, or of another version of the protocol.
        SpecError: It is not an object.
    """
    fields = Fields(parse_message(body))
    if fields.has("protocol") and fields.integer("protocol") != PROTOCOL:
        raise WireError(WireReason.UNSUPPORTED_VERSION, f"known is protocol {PROTOCOL}")
    return fields
