"""How a pod and the controller prove to each other that they hold the same secret, when a stream begins."""

import secrets as random_source
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from kvserve_api.credentials import NONCE_BYTES, Loaded, proof, proven_by
from kvserve_api.errors import UnauthenticatedError

NONCE_KEY: Final = "kvserve-nonce-bin"
PROOF_KEY: Final = "kvserve-proof-bin"
CONTROLLER: Final = "kvserve control 1 controller"
POD: Final = "kvserve control 1 pod"

Metadata = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class PodSide:
    """A pod's part, for one stream."""

    secrets: Sequence[bytes]
    nonce: bytes

    @classmethod
    def begin(cls, secrets: Sequence[bytes]) -> "PodSide":
        """Return the part of a pod with these secrets; without any it sends nothing and asks for nothing."""
        return cls(secrets, random_source.token_bytes(NONCE_BYTES) if secrets else b"")

    @property
    def metadata(self) -> Metadata:
        """What goes with the request."""
        return ((NONCE_KEY, self.nonce),) if self.nonce else ()

    def prove(self, metadata: Iterable[Any]) -> bytes:
        """Return the Hello's proof, once the controller has given its own.

        Args:
            metadata: The controller's initial metadata, as pairs.

        Raises:
            UnauthenticatedError: The controller proves nothing.
        """
        if not self.secrets:
            return b""
        found = _found(metadata)
        said = (self.nonce, found.get(NONCE_KEY, b""))
        shared = proven_by(self.secrets, found.get(PROOF_KEY, b""), CONTROLLER, *said)
        if shared is None or len(said[1]) != NONCE_BYTES:
            raise UnauthenticatedError(
                "the controller does not prove to hold our secret: give it the same --secret-file"
            )
        return proof(shared, POD, *said)


@dataclass(frozen=True, slots=True)
class ControllerSide:
    """The controller's part, for one stream."""

    secrets: Sequence[bytes]
    nonce: bytes
    theirs: bytes

    @classmethod
    def begin(cls, secrets: Sequence[bytes], metadata: Iterable[Any]) -> "ControllerSide":
        """Return the part of a controller with these secrets towards a pod that sent this metadata.

        Raises:
            UnauthenticatedError: The pod begins no proof.
        """
        theirs = _found(metadata).get(NONCE_KEY, b"")
        if secrets and len(theirs) != NONCE_BYTES:
            raise UnauthenticatedError("proof of a secret is wanted: set secret_file in the pod")
        if theirs and not secrets:
            raise UnauthenticatedError("no secret is known here: give the controller --secret-file")
        return cls(secrets, random_source.token_bytes(NONCE_BYTES) if secrets else b"", theirs)

    @property
    def metadata(self) -> Metadata:
        """What goes back at once."""
        if not self.secrets:
            return ()
        own = proof(self.secrets[0], CONTROLLER, self.theirs, self.nonce)
        return ((NONCE_KEY, self.nonce), (PROOF_KEY, own))

    def check(self, given: bytes) -> None:
        """Check a Hello's proof.

        Raises:
            UnauthenticatedError: It is none.
        """
        secrets = self.secrets[:1]
        if secrets and proven_by(secrets, given, POD, self.theirs, self.nonce) is None:
            raise UnauthenticatedError("the pod does not prove to hold our secret")


def channel_credentials(loaded: Loaded) -> grpc.ChannelCredentials | None:
    """Return what a pod's channel is made with; None for a plain one."""
    if loaded.client is None:
        return None
    return grpc.ssl_channel_credentials(loaded.ca_pem, loaded.key_pem, loaded.cert_pem)


def _found(metadata: Iterable[Any]) -> dict[str, bytes]:
    return {key: value for key, value in metadata or () if isinstance(value, bytes)}
