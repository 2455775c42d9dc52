"""How the ends of a new connection prove to each other that they hold the same secret, before anything else is said.

    consumer                                producer
    HELLO {nonce, target}             →
                                      ←     CHALLENGE {nonce, proof}   or   REFUSE
    PROOF {proof}                     →

Both proofs cover both nonces, the role of who proves, the address that the consumer meant to reach and, with TLS, the
certificate it was shown: whoever stands between two members and passes their words on proves nothing to either, unless
it holds the producer's own address. The producer proves first, so a consumer tells a stranger no more than a nonce.
Without a secret the proofs are empty, and the exchange still tells a consumer whether its certificate was accepted.
"""

import secrets as random_source
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.credentials import NONCE_BYTES, PROOF_BYTES, proof, proven_by
from kvserve_api.errors import SpecError, UnauthenticatedError, WireError, WireReason
from kvserve_api.fields import Fields
from kvserve_connector.frames import FrameSocket
from kvserve_connector.protocol import Kind, pack_message, parse_message
from kvserve_connector.replies import Refuse

MAX_BYTES: Final = 2048
"""What a stranger may make a pod read."""
PRODUCER: Final = "kvserve transfer 1 producer"
CONSUMER: Final = "kvserve transfer 1 consumer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """A consumer's first word: its nonce, and the ``host:port`` it means to have reached."""

    nonce: bytes
    target: str

    def pack(self) -> bytes:
        """Return the frame."""
        return pack_message(Kind.HELLO, {"nonce": self.nonce.hex(), "target": self.target})

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        fields = _fields(body, "HELLO")
        return cls(
            nonce=_bytes(fields, "nonce", NONCE_BYTES),
            target=_string(fields, "target", 300),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenge:
    """A producer's answer: its nonce, and its proof; empty if it has no secret."""

    nonce: bytes
    proof: bytes

    def pack(self) -> bytes:
        """Return the frame."""
        value = {"nonce": self.nonce.hex(), "proof": self.proof.hex()}
        return pack_message(Kind.CHALLENGE, value)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read the message; `WireError` if anything in it is wrong."""
        fields = _fields(body, "CHALLENGE")
        return cls(
            nonce=_bytes(fields, "nonce", NONCE_BYTES),
            proof=_bytes(fields, "proof", 0, PROOF_BYTES),
        )


def ask(frames: FrameSocket, secrets: Sequence[bytes], target: str, certificate: bytes) -> None:
    """Do the consumer's part.

    Args:
        frames: A new connection.
        secrets: The consumer's; empty if it has none.
        target: The ``host:port`` it was made to.
        certificate: Digest of the certificate that was shown; empty without TLS.

    Raises:
        UnauthenticatedError: The producer proves nothing, or wants a proof that this pod can't give.
        WireError: What came is no answer.
        TransferError: The producer is gone or silent.
    """
    hello = Hello(nonce=random_source.token_bytes(NONCE_BYTES), target=target)
    frames.send(hello.pack())
    challenge = Challenge.parse(_receive(frames, Kind.CHALLENGE))
    said = (hello.nonce, challenge.nonce, target.encode(), certificate)
    mine = b""
    if secrets:
        shared = proven_by(secrets, challenge.proof, PRODUCER, *said)
        if shared is None:
            raise UnauthenticatedError(
                f"{target} does not prove to hold our secret: give both pods the same secret_file"
            )
        mine = proof(shared, CONSUMER, *said)
    elif challenge.proof:
        raise UnauthenticatedError(f"{target} wants proof of a secret: set secret_file here")
    frames.send(pack_message(Kind.PROOF, {"proof": mine.hex()}))


def answer(frames: FrameSocket, secrets: Sequence[bytes], target: str, certificate: bytes) -> None:
    """Do the producer's part.

    Args:
        frames: A new connection.
        secrets: The producer's; empty if it has none.
        target: The ``host:port`` that it tells consumers to use.
        certificate: Digest of its own certificate if the connection is TLS; else empty.

    Raises:
        UnauthenticatedError: The consumer proves nothing.
        WireError: What came is no such message.
        TransferError: The consumer is gone or silent.
    """
    hello = Hello.parse(_receive(frames, Kind.HELLO))
    nonce = random_source.token_bytes(NONCE_BYTES)
    said = (hello.nonce, nonce, hello.target.encode(), certificate)
    if not secrets:
        frames.send(Challenge(nonce=nonce, proof=b"").pack())
        _receive(frames, Kind.PROOF)
        return
    # nothing is proven to who means another pod: its words were passed on
    if hello.target != target:
        raise UnauthenticatedError(
            f"{hello.target} was meant, and this is {target}: set advertise_host to what consumers use"
        )
    frames.send(Challenge(nonce=nonce, proof=proof(secrets[0], PRODUCER, *said)).pack())
    given = _bytes(_fields(_receive(frames, Kind.PROOF), "PROOF"), "proof", 0, PROOF_BYTES)
    if proven_by(secrets[:1], given, CONSUMER, *said) is None:
        raise UnauthenticatedError("it does not prove to hold our secret")


def _receive(frames: FrameSocket, kind: Kind) -> bytes:
    header = frames.receive_header()
    if header.length > MAX_BYTES:
        raise UnauthenticatedError(f"{header.kind.name} comes instead of {kind.name}")
    body = frames.receive_body(header)
    if header.kind == Kind.REFUSE:
        raise Refuse.parse(body).error
    if header.kind != kind:
        raise UnauthenticatedError(
            f"{header.kind.name} comes instead of {kind.name}: the peer has no secret_file and no certificate"
        )
    return body


def _fields(body: bytes, what: str) -> Fields:
    try:
        return Fields(parse_message(body), what)
    except SpecError as error:
        raise WireError(WireReason.MALFORMED, str(error)) from error


def _string(fields: Fields, key: str, max_length: int) -> str:
    try:
        return fields.string(key, max_length=max_length)
    except SpecError as error:
        raise WireError(WireReason.MALFORMED, str(error)) from error


def _bytes(fields: Fields, key: str, *lengths: int) -> bytes:
    text: Any = _string(fields, key, 2 * max(lengths))
    try:
        data = bytes.fromhex(text)
    except ValueError as error:
        raise WireError(WireReason.MALFORMED, f"{fields.at(key)} must be hex") from error
    if len(data) not in lengths:
        raise WireError(WireReason.MALFORMED, f"{fields.at(key)} has {len(data)} bytes")
    return data
