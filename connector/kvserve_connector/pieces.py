"""How a producer and a consumer speak of pieces of chunks that NIXL carries; see `kvserve_connector.protocol`."""

import base64
import binascii
import struct
import zlib
from dataclasses import dataclass
from typing import Final, Self

from kvserve_api.errors import SpecError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_connector.protocol import Kind, pack_header

MAX_AGENT: Final = 64
MAX_METADATA_BYTES: Final = 64 << 10
_CRC = struct.Struct("<I")
_STAGED: Final = struct.Struct("<QII")
STAGED_BYTES: Final = _STAGED.size
_TAKEN: Final = struct.Struct("<Q")
TAKEN_BYTES: Final = _TAKEN.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a consumer must know of a producer's staging memory.

    Attributes:
        agent: Name of the producer's NIXL agent.
        metadata: What NIXL says of it; read by NIXL only.
    """

    agent: str
    metadata: bytes

    def to_json(self) -> dict[str, str]:
        """Return it as plain JSON."""
        return {"agent": self.agent, "metadata": base64.b64encode(self.metadata).decode()}

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read it from its plain form; `SpecError` if anything in it is wrong."""
        most = MAX_METADATA_BYTES * 4 // 3 + 4
        try:
            metadata = base64.b64decode(fields.string("metadata", max_length=most), validate=True)
        except (binascii.Error, ValueError) as error:
            raise SpecError("nixl.metadata", f"must be base64: {error}") from error
        offer = cls(agent=fields.string("agent", max_length=MAX_AGENT), metadata=metadata)
        fields.done()
        return offer


def pack_staged(index: int, address: int, length: int, *, seed: int) -> bytes:
    """Return the whole frame that says where a piece of a chunk is.

    Args:
        index: The chunk's place in the plan.
        address: Where the piece begins in the producer's memory.
        length: Bytes of the whole chunk.
        seed: What the checksums begin with, as those of a chunk's header.
    """
    body = _STAGED.pack(address, length, 0)[: -_CRC.size]
    crc = _CRC.pack(zlib.crc32(body, seed))
    return pack_header(Kind.STAGED, STAGED_BYTES, index, seed=seed) + body + crc


def parse_staged(body: bytes, seed: int) -> tuple[int, int]:
    """Return where a piece is, and how many bytes its chunk has; neither is checked against any bound.

    Raises:
        WireError: It is damaged, or of another transfer.
    """
    if len(body) != STAGED_BYTES:
        raise WireError(WireReason.TRUNCATED, f"STAGED has {STAGED_BYTES} bytes")
    address, length, crc = _STAGED.unpack(body)
    if crc != zlib.crc32(body[: -_CRC.size], seed):
        raise WireError(WireReason.CHECKSUM_MISMATCH, "STAGED is damaged")
    return address, length


def pack_taken(index: int, taken_s: float) -> bytes:
    """Return the whole frame that says that a piece was read, and in how many seconds."""
    return pack_header(Kind.TAKEN, TAKEN_BYTES, index) + _TAKEN.pack(max(1, int(taken_s * 1e9)))


def parse_taken(body: bytes) -> float:
    """Return the seconds that a consumer says reading a piece took."""
    if len(body) != TAKEN_BYTES:
        raise WireError(WireReason.TRUNCATED, f"TAKEN has {TAKEN_BYTES} bytes")
    taken_s: float = _TAKEN.unpack(body)[0] / 1e9
    return taken_s
