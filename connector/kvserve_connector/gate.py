"""Who may talk to whom: a consumer's way out (`Gate`) and a producer's way in (`Door`).

Addresses come with requests, through routers and clients, so they are wishes and not facts. A consumer connects only
where `peers` allows it, and takes nothing from who does not prove to be a member; a producer reads no request of who
does not. Without credentials everybody is a member.
"""

import ipaddress
import socket
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Final

from kvserve_api.credentials import Credentials, Loaded, certificate_digest
from kvserve_api.errors import (
    KVServeError,
    TransferError,
    TransferReason,
    UnauthenticatedError,
)
from kvserve_connector import handshake
from kvserve_connector.config import PATH, ConnectorConfig, Network
from kvserve_connector.frames import FrameSocket
from kvserve_connector.protocol import Kind
from kvserve_connector.replies import Refuse

HANDSHAKE_S: Final = 5.0
"""Most seconds in which a stranger must have become a member."""
MAX_STRANGERS: Final = 32
"""Connections that may be in their handshake at once; one more ends the oldest, so that silence keeps nobody out."""
FAREWELL_S: Final = 1.0
FAREWELL_BYTES: Final = 1 << 20
_TLS_HANDSHAKE: Final = 0x16


class Gate:
    """A consumer's way to producers.

    Args:
        config: The connector's settings.

    Raises:
        SpecError: A credential file can't be used.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        self._config = config
        self._credentials = _credentials(config, serves=False)

    def connect(self, host: str, port: int, *, timeout_s: float) -> FrameSocket:
        """Open a connection to a producer that has proven to be one.

        Args:
            host: Its name or address.
            port: Its port.
            timeout_s: Most seconds for all of it.

        Raises:
            UnauthenticatedError: It is outside `peers`, proves nothing, or does not let us in.
            TransferError: Nobody answers, or not in time.
            WireError: What answers speaks another language.
        """
        stall_s = self._config.stall_s
        address = _allowed(host, port, self._config.peers)
        frames = FrameSocket.connect(address, port, timeout_s=timeout_s, stall_s=stall_s)
        if self._credentials is None:
            return frames
        try:
            loaded = self._credentials.current()
            frames.set_budget(min(timeout_s, HANDSHAKE_S))
            if loaded.client is not None:
                frames.secure(
                    loaded.client, server_side=False, server_name=self._config.tls_server_name
                )
            shown = certificate_digest(frames.peer_certificate)
            handshake.ask(frames, loaded.secrets, _target(host, port), shown)
        except BaseException:
            frames.close()
            raise
        return frames


class Door:
    """A producer's way in.

    Args:
        config: The connector's settings.

    Raises:
        SpecError: A credential file can't be used.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        self._config = config
        self._credentials = _credentials(config, serves=True)
        self._lock = threading.Lock()
        self._strangers: OrderedDict[FrameSocket, None] = OrderedDict()

    def knock(self, frames: FrameSocket) -> None:
        """Give a new connection a place among the strangers, and take it from the oldest if there is none.

        To be called in the order in which connections come, and `leave` for each of them in the end.
        """
        with self._lock:
            self._strangers[frames] = None
            if len(self._strangers) > MAX_STRANGERS:
                oldest, _ = self._strangers.popitem(last=False)
                oldest.interrupt()

    def leave(self, frames: FrameSocket) -> None:
        """Give a connection's place to others; it has become a member, or has ended."""
        with self._lock:
            self._strangers.pop(frames, None)

    def admit(self, frames: FrameSocket, port: int) -> None:
        """Let a member in; of who is none a few hundred bytes are read.

        Args:
            frames: A new connection.
            port: The one that consumers are told.

        Raises:
            UnauthenticatedError: It proves nothing; it must be told by `turn_away`.
            WireError: It speaks another language.
            TransferError: It is gone or silent.
        """
        loaded = Loaded() if self._credentials is None else self._credentials.current()
        frames.set_budget(HANDSHAKE_S)
        encrypted = frames.first_byte() == _TLS_HANDSHAKE
        if encrypted != (loaded.server is not None):
            raise UnauthenticatedError(
                "TLS is not spoken here: tls_cert_file is not set"
                if encrypted
                else "TLS is wanted here: set tls_ca_file"
            )
        if loaded.server is not None:
            frames.secure(loaded.server, server_side=True)
        if self._credentials is not None:
            target = _target(self._config.advertise_host, port)
            handshake.answer(frames, loaded.secrets, target, loaded.certificate)
        self.leave(frames)

    def expect_no(self, kind: Kind) -> None:
        """Say what is wrong with a frame that is no request.

        Raises:
            UnauthenticatedError: It begins a handshake that this pod can't finish.
            TransferError: It is out of place.
        """
        if kind == Kind.HELLO:
            raise UnauthenticatedError("no secret is known here: set secret_file")
        raise TransferError(TransferReason.PEER_REFUSED, f"{kind.name} comes first")

    def turn_away(self, frames: FrameSocket, error: UnauthenticatedError) -> None:
        """Tell who is at the other end why nothing is said to it."""
        with suppress(KVServeError):
            frames.set_budget(FAREWELL_S)
            frames.send(Refuse(reason=error.reason, detail=str(error)).pack())
        frames.drain(FAREWELL_S, FAREWELL_BYTES)


def _credentials(config: ConnectorConfig, *, serves: bool) -> Credentials | None:
    if not config.credentials:
        return None
    named = config.tls_server_name is not None
    return Credentials(config.credentials, PATH, serves=serves, named=named)


def _target(host: str, port: int) -> str:
    return f"{host}:{port}"


def _allowed(host: str, port: int, networks: tuple[Network, ...]) -> str:
    """Return the address to connect to, which is in one of the networks.

    Raises:
        UnauthenticatedError: None of the host's addresses is.
        TransferError: The host has no address.
    """
    if not networks:
        return host
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransferError(TransferReason.PEER_LOST, f"{host}:{port}: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if any(ipaddress.ip_address(address) in network for network in networks):
            return address
    raise UnauthenticatedError(f"{host} is in none of the networks that peers names")
