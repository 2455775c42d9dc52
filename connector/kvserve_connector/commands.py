"""What a consumer says to a producer: PULL, RELEASE and RENEW; see `kvserve_connector.protocol`."""

import re
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.errors import SpecError, WireError, WireReason
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import read_span
from kvserve_connector.protocol import PROTOCOL, Kind, pack_message, read_fields
from kvserve_connector.remote import MAX_ID, MAX_RANKS, MAX_TOKENS

MAX_STAGES: Final = 256
PARTS: Final = "transfer.parts.v1"
"""Stands among the stages of a consumer that understands an END with parts: producers pass over ids they don't know."""
PROBES: Final = "transfer.probes.v1"
"""Likewise of one that takes probes of the link when an END wishes for them."""
MAX_BUNDLES: Final = 64
MAX_RENEWED: Final = 1024
MAX_DELAYS: Final = 1e4
"""More requests than an engine has at once."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


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
        stages: Ids of the stages it can decode, and `PARTS` and `PROBES`.
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

    @property
    def takes_parts(self) -> bool:
        """Whether the consumer understands that several profiles have coded a transfer."""
        return PARTS in self.stages

    @property
    def takes_probes(self) -> bool:
        """Whether the consumer takes probes of the link."""
        return PROBES in self.stages

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
            fields = read_fields(body)
            layout = fields.child("layout")
            pull = cls(
                engine_id=fields.string("engine_id", max_length=MAX_ID),
                request_id=fields.string("request_id", max_length=MAX_ID),
                tokens=read_span(fields.items("tokens", max_items=2), "tokens", MAX_TOKENS),
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
            fields = read_fields(body)
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
            fields = read_fields(body)
            renew = cls(names=tuple(map(_id, fields.items("names", max_items=MAX_RENEWED))))
            fields.done()
        except SpecError as error:
            raise WireError(WireReason.MALFORMED, f"RENEW: {error}") from error
        return renew


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
