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

Where both sides have NIXL, the bytes of chunks do not come over the connection (`kvserve_connector.staged`): in place
of each CHUNK there are

                            ←     STAGED {where, how many}  (for each piece of it)
    TAKEN {seconds}         →     the piece's room is free

A PULL that names a transfer may come before its prefill has ended. Its chunks come in any order; their headers say
which they are.

With credentials, HELLO, CHALLENGE and PROOF come before all that; see `kvserve_connector.handshake`.
"""

import base64
import binascii
import json
import re
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Self

from kvserve_api.errors import (
    KVServeError,
    SpecError,
    TransferError,
    TransferReason,
    UnauthenticatedError,
    WireError,
    WireReason,
)
from kvserve_api.fields import Fields
from kvserve_api.profile_set import NAME_PATTERN
from kvserve_api.table import Version
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import Chunk
from kvserve_connector.remote import MAX_ID, MAX_RANKS, MAX_TOKENS

MAGIC: Final = b"KVT1"
HEADER: Final = struct.Struct("<4sBxHII")
HEADER_BYTES: Final = HEADER.size
MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_CHUNKS: Final = 8192
MAX_STAGES: Final = 256
MAX_BUNDLES: Final = 64
MAX_PARTS: Final = 1024
MAX_RENEWED: Final = 1024
MAX_AGENT: Final = 64
MAX_DELAYS: Final = 1e4
"""More requests than an engine has at once."""
MAX_METADATA_BYTES: Final = 64 << 10
PROTOCOL: Final = 1
_CRC = struct.Struct("<I")
_STAGED: Final = struct.Struct("<QII")
STAGED_BYTES: Final = _STAGED.size
_TAKEN: Final = struct.Struct("<Q")
TAKEN_BYTES: Final = _TAKEN.size
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Pull:
    """A consumer's wish.

    Attributes:
        engine_id: The producer's run that holds the KV.
        request_id: The request's name there, or the transfer's.
        tokens: Which tokens are wanted.
        prompt_digest: What they must have been computed from.
        fingerprint: The consumer's model.
        layout: Form of the consumer's cache, or of its first part.
        blocks: What the consumer's blocks hold, where they are carried whole; see `kvserve_connector.form.Form`.
        stages: Ids of the stages it can decode.
        bundles: Digests of the calibration bundles that it has ready.
        budget_s: Seconds until it gives up.
        traceparent: Its transfer span.
        transfer: Whether a transfer is named, whose prefill may not have ended.
        rank: Which tensor-parallel worker of the consumer this is.
        ranks: How many there are.
        nixl: Whether it would read the chunks by NIXL.
        decode_delays: How many requests of the consumer's engine a second of decoding delays by a second.
    """

    engine_id: str
    request_id: str
    tokens: range
    prompt_digest: str
    fingerprint: str
    layout: KVLayout
    stages: frozenset[str]
    budget_s: float
    traceparent: str | None
    bundles: frozenset[str] = frozenset()
    blocks: str = ""
    transfer: bool = False
    rank: int = 0
    ranks: int = 1
    nixl: bool = False
    decode_delays: float = 0.0

    def pack(self) -> bytes:
        """Return the frame."""
        # a producer that knows no bundles must not stumble over a consumer that has none
        bundles = {"bundles": sorted(self.bundles)} if self.bundles else {}
        blocks = {"blocks": self.blocks} if self.blocks else {}
        transfer = {"transfer": True} if self.transfer else {}
        return pack_message(
            Kind.PULL,
            bundles
            | blocks
            | transfer
            | ({"rank": self.rank, "ranks": self.ranks} if self.ranks > 1 else {})
            | ({"nixl": True} if self.nixl else {})
            | ({"decode_delays": self.decode_delays} if self.decode_delays else {})
            | {
                "protocol": PROTOCOL,
                "engine_id": self.engine_id,
                "request_id": self.request_id,
                "tokens": [self.tokens.start, self.tokens.stop],
                "prompt_digest": self.prompt_digest,
                "fingerprint": self.fingerprint,
                "layout": self.layout.to_json(),
                "stages": sorted(self.stages),
                "budget_s": self.budget_s,
                "traceparent": self.traceparent,
            },
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            layout = fields.child("layout")
            pull = cls(
                engine_id=fields.string("engine_id", max_length=MAX_ID),
                request_id=fields.string("request_id", max_length=MAX_ID),
                tokens=_span(fields.items("tokens", max_items=2), "tokens", MAX_TOKENS),
                prompt_digest=fields.string("prompt_digest", max_length=64),
                fingerprint=fields.string("fingerprint", max_length=80),
                layout=KVLayout(
                    layers=layout.integer("layers"),
                    kv_heads=layout.integer("kv_heads"),
                    head_dim=layout.integer("head_dim"),
                    dtype=layout.string("dtype", max_length=16),
                ),
                stages=frozenset(map(_stage, fields.items("stages", max_items=MAX_STAGES))),
                bundles=frozenset(map(_bundle, fields.items("bundles", [], max_items=MAX_BUNDLES))),
                blocks=fields.string("blocks", "", max_length=80),
                budget_s=fields.number("budget_s", minimum=0, maximum=7200),
                traceparent=fields.string("traceparent", None, max_length=128),
                transfer=fields.boolean("transfer", False),
                rank=fields.integer("rank", 0, minimum=0, maximum=MAX_RANKS - 1),
                ranks=fields.integer("ranks", 1, minimum=1, maximum=MAX_RANKS),
                nixl=fields.boolean("nixl", False),
                decode_delays=fields.number("decode_delays", 0.0, minimum=0, maximum=MAX_DELAYS),
            )
            layout.done()
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"PULL: {error}") from error
        return pull


@dataclass(frozen=True, kw_only=True, slots=True)
class Accept:
    """A producer's promise.

    Attributes:
        profile: Name of the profile it uses.
        wanted: What the table would have used; differs in mode Shadow.
        bound: What decided.
        predicted_s: What the model expects the transfer to take.
        version: Of the table that decided; None without one.
        pod: The producer's pod.
        model_s: From the request's arrival there to the end of its prefill.
        chunks: What comes, in this order; together exactly what was asked for.
        nixl: Where the chunks are read by NIXL; None if they come over the connection.
    """

    profile: str
    wanted: str
    bound: str
    predicted_s: float
    version: Version | None
    pod: str
    model_s: float
    chunks: tuple[Chunk, ...]
    nixl: Offer | None = None

    def pack(self) -> bytes:
        """Return the frame."""
        return pack_message(
            Kind.ACCEPT,
            ({} if self.nixl is None else {"nixl": self.nixl.to_json()})
            | {
                "profile": self.profile,
                "wanted": self.wanted,
                "bound": self.bound,
                "predicted_s": self.predicted_s,
                "version": None if self.version is None else str(self.version),
                "pod": self.pod,
                "model_s": self.model_s,
                "chunks": [chunk.to_json() for chunk in self.chunks],
            },
        )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            version = fields.string("version", None, max_length=64)
            accept = cls(
                profile=_name(fields.string("profile", max_length=63), "profile"),
                wanted=_name(fields.string("wanted", max_length=63), "wanted"),
                bound=fields.string("bound", max_length=63),
                predicted_s=fields.number("predicted_s", minimum=0),
                version=Version.parse(version) if fields.has("version") else None,
                pod=fields.string("pod", max_length=253),
                model_s=fields.number("model_s", minimum=0),
                chunks=tuple(map(_chunk, fields.items("chunks", max_items=MAX_CHUNKS))),
                nixl=Offer.read(fields.child("nixl")) if fields.has("nixl") else None,
            )
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"ACCEPT: {error}") from error
        return accept


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """What a producer knows when its last chunk is out.

    Attributes:
        encode_s: Seconds of encoding, summed over the chunks.
        goodput_bytes_per_s: Its estimate of the link.
        waited_s: Seconds in which nothing was to be sent, because the prefill was not so far.
        model_s: As in `Accept`, of a prefill that had not ended then.
    """

    encode_s: float
    goodput_bytes_per_s: float
    waited_s: float = 0.0
    model_s: float = 0.0

    def pack(self) -> bytes:
        """Return the frame."""
        value = {"encode_s": self.encode_s, "goodput_bytes_per_s": self.goodput_bytes_per_s}
        if self.waited_s or self.model_s:
            value |= {"waited_s": self.waited_s, "model_s": self.model_s}
        return pack_message(Kind.END, value)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            end = cls(
                encode_s=fields.number("encode_s", minimum=0),
                goodput_bytes_per_s=fields.number("goodput_bytes_per_s", minimum=0),
                waited_s=fields.number("waited_s", 0.0, minimum=0),
                model_s=fields.number("model_s", 0.0, minimum=0),
            )
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"END: {error}") from error
        return end


@dataclass(frozen=True, kw_only=True, slots=True)
class Refuse:
    """Why a producer sends nothing (more)."""

    reason: str
    detail: str

    @property
    def error(self) -> KVServeError:
        """What a consumer makes of it."""
        if self.reason == UnauthenticatedError.reason:
            return UnauthenticatedError(self.detail)
        return TransferError(TransferReason.PEER_REFUSED, f"{self.reason}: {self.detail}")

    def pack(self) -> bytes:
        """Return the frame."""
        return pack_message(Kind.REFUSE, {"reason": self.reason, "detail": self.detail[:512]})

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            refuse = cls(
                reason=fields.string("reason", max_length=64),
                detail=fields.string("detail", max_length=512),
            )
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"REFUSE: {error}") from error
        return refuse


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A consumer's word that nobody will fetch a prefill.

    Attributes:
        engine_id: The producer's run.
        request_id: The request's name there, or the transfer's.
        transfer: Which of both.
    """

    engine_id: str
    request_id: str
    transfer: bool = False

    def pack(self) -> bytes:
        """Return the frame."""
        value: dict[str, Any] = {"engine_id": self.engine_id, "request_id": self.request_id}
        return pack_message(Kind.RELEASE, value | ({"transfer": True} if self.transfer else {}))

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            release = cls(
                engine_id=fields.string("engine_id", max_length=MAX_ID),
                request_id=fields.string("request_id", max_length=MAX_ID),
                transfer=fields.boolean("transfer", False),
            )
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"RELEASE: {error}") from error
        return release


@dataclass(frozen=True, kw_only=True, slots=True)
class Renew:
    """A consumer's word that it will still fetch prefills, for which it has no room yet.

    Attributes:
        names: The requests' names at the producer, or the transfers'.
    """

    names: tuple[str, ...]

    def pack(self) -> bytes:
        """Return the frame."""
        return pack_message(Kind.RENEW, {"names": list(self.names)})

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = _fields(body)
            renew = cls(names=tuple(map(_id, fields.items("names", max_items=MAX_RENEWED))))
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"RENEW: {error}") from error
        return renew


def _fields(body: bytes) -> Fields:
    fields = Fields(parse_message(body))
    if fields.has("protocol") and fields.integer("protocol") != PROTOCOL:
        raise WireError(WireReason.UNSUPPORTED_VERSION, f"known is protocol {PROTOCOL}")
    return fields


def _name(value: str, where: str) -> str:
    # it becomes a label of metrics
    if not NAME_PATTERN.fullmatch(value):
        raise SpecError(where, f"must be a profile's name, got {value!r}")
    return value


def _id(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_ID:
        raise SpecError("names", f"must be strings of at most {MAX_ID} characters")
    return value


def _stage(value: object) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise SpecError("stages", "must be strings of at most 64 characters")
    return value


def _bundle(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise SpecError("bundles", "must be digests of the form sha256:<64 hex digits>")
    return value


def _span(value: Any, where: str, maximum: int) -> range:
    pair: list[Any] = value if isinstance(value, list) and len(value) == 2 else [None, None]
    # a bool is an int to isinstance
    if any(type(item) is not int for item in pair) or not 0 <= pair[0] < pair[1] <= maximum:
        raise SpecError(where, f"must be two growing integers up to {maximum}")
    return range(value[0], value[1])


def _chunk(value: Any) -> Chunk:
    if not isinstance(value, list) or len(value) not in (4, 5):
        raise SpecError("chunks", "must be lists of four or five integers")
    part = value[4] if len(value) == 5 else 0
    if type(part) is not int or not 0 <= part <= MAX_PARTS:
        raise SpecError("chunks.part", f"must be an integer up to {MAX_PARTS}")
    return Chunk(
        part=part,
        layers=_span(value[:2], "chunks.layers", 65_535),
        tokens=_span(value[2:4], "chunks.tokens", MAX_TOKENS),
    )
