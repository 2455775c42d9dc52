"""What a producer answers: ACCEPT, END and REFUSE; see `kvserve_connector.protocol`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from kvserve_api.errors import (
    KVServeError,
    SpecError,
    TransferError,
    TransferReason,
    UnauthenticatedError,
    WireError,
    WireReason,
)
from kvserve_api.profile_set import NAME_PATTERN
from kvserve_api.table import Version
from kvserve_connector.chunks import Chunk
from kvserve_connector.pieces import Offer
from kvserve_connector.protocol import Kind, pack_message, read_fields

MAX_CHUNKS: Final = 8192
MAX_PARTS: Final = 16
MAX_PART_BYTES: Final = 1 << 50


class Part(NamedTuple):
    """What one profile coded of a transfer.

    Attributes:
        native_bytes: Native KV bytes.
        wire_bytes: Bytes of its chunks.
        encode_s: Seconds of encoding them, where the producer counts them.
    """

    native_bytes: int
    wire_bytes: int
    encode_s: float = 0.0


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
            fields = read_fields(body)
            version = fields.string("version", None, max_length=64)
            accept = cls(
                profile=_name(fields.string("profile", max_length=63), "profile"),
                wanted=_name(fields.string("wanted", max_length=63), "wanted"),
                bound=fields.string("bound", max_length=63),
                predicted_s=fields.number("predicted_s", minimum=0),
                version=Version.parse(version) if fields.has("version") else None,
                pod=fields.string("pod", max_length=253),
                model_s=fields.number("model_s", minimum=0),
                chunks=tuple(map(Chunk.read, fields.items("chunks", max_items=MAX_CHUNKS))),
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
        prefill_s: Seconds from the PULL's arrival to the end of that prefill, or to this message if it comes first.
        parts: By profile, where several coded it; without their seconds.
        probe: It would like to know whether the link has become faster.
    """

    encode_s: float
    goodput_bytes_per_s: float
    waited_s: float = 0.0
    model_s: float = 0.0
    prefill_s: float = 0.0
    parts: Mapping[str, Part] = field(default_factory=dict)
    probe: bool = False

    def pack(self) -> bytes:
        """Return the frame."""
        value: dict[str, Any] = {
            "encode_s": self.encode_s,
            "goodput_bytes_per_s": self.goodput_bytes_per_s,
        }
        if self.waited_s or self.model_s:
            value |= {"waited_s": self.waited_s, "model_s": self.model_s}
        if self.prefill_s:
            value["prefill_s"] = self.prefill_s
        if self.parts:
            value["parts"] = {
                name: [part.native_bytes, part.wire_bytes] for name, part in self.parts.items()
            }
        if self.probe:
            value["probe"] = True
        return pack_message(Kind.END, value)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        try:
            fields = read_fields(body)
            end = cls(
                encode_s=fields.number("encode_s", minimum=0),
                goodput_bytes_per_s=fields.number("goodput_bytes_per_s", minimum=0),
                waited_s=fields.number("waited_s", 0.0, minimum=0),
                model_s=fields.number("model_s", 0.0, minimum=0),
                prefill_s=fields.number("prefill_s", 0.0, minimum=0),
                parts=_parts(fields.mapping("parts", {})),
                probe=fields.boolean("probe", False),
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
            fields = read_fields(body)
            refuse = cls(
                reason=fields.string("reason", max_length=64),
                detail=fields.string("detail", max_length=512),
            )
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"REFUSE: {error}") from error
        return refuse


def _parts(value: dict[str, Any]) -> dict[str, Part]:
    if len(value) > MAX_PARTS:
        raise SpecError("parts", f"must be at most {MAX_PARTS}, got {len(value)}")
    parts = {}
    for name, pair in value.items():
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            # a bool is an int to isinstance
            and all(type(count) is int and 0 < count <= MAX_PART_BYTES for count in pair)
        ):
            raise SpecError("parts", f"must be two numbers of bytes each, got {pair!r}")
        parts[_name(name, "parts")] = Part(*pair)
    return parts


def _name(value: str, where: str) -> str:
    # it becomes a label of metrics
    if not NAME_PATTERN.fullmatch(value):
        raise SpecError(where, f"must be a profile's name, got {value!r}")
    return value
