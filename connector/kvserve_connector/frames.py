"""Frames over a TCP connection, with or without TLS, with a deadline for the whole and a limit for silence."""

import contextlib
import select
import socket
import ssl
import time
import zlib
from typing import Final

from kvserve_api.errors import (
    KVServeError,
    TransferError,
    TransferReason,
    UnauthenticatedError,
    WireError,
    WireReason,
)
from kvserve_connector.protocol import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    FrameHeader,
    Kind,
    pack_header,
    parse_header,
)

_TCP_NOTSENT_LOWAT: Final = 25
_TCP_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)
_UNSENT: Final = 256 << 10
_PIECE: Final = 256 << 10
"""Bytes handed to the kernel at once: small enough that a lost peer is noticed by ``stall_s``."""
_TLS_PIECE: Final = 64 << 10
"""The same for TLS, which comes back only when all of them are gone; smaller ones cost more processor time."""


class FrameSocket:
    """One end of a connection; used by one thread at a time.

    Args:
        connection: A connected socket; owned from now on.
        stall_s: Most seconds without a byte, in either direction.
    """

    def __init__(self, connection: socket.socket, stall_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        # unsent bytes wait here and not in the kernel: a slow link then still shows progress all the time
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT)
        self._stall_s = stall_s
        self._silence_s = stall_s
        self._deadline_s = time.monotonic() + stall_s
        self.received_bytes = 0
        self._piece = _PIECE
        self._seed = 0

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_s: float, stall_s: float) -> "FrameSocket":
        """Open a connection.

        Raises:
            TransferError: Nobody answers, or not in time.
        """
        try:
            connection = socket.create_connection((host, port), timeout=min(timeout_s, stall_s))
        except TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, f"no answer from {host}:{port}") from error
        except OSError as error:
            raise TransferError(TransferReason.PEER_LOST, f"{host}:{port}: {error}") from error
        return cls(connection, stall_s)

    def secure(
        self, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None
    ) -> None:
        """Speak TLS from here on.

        Raises:
            UnauthenticatedError: The other side does not, or shows no certificate that is good here.
            TransferError: The peer is gone or silent.
        """
        try:
            self._arm()
            # first the socket, then the handshake: an interrupt must find what is being waited on
            self.socket = context.wrap_socket(
                self.socket,
                server_side=server_side,
                server_hostname=server_name,
                do_handshake_on_connect=False,
            )
            self._piece = _TLS_PIECE
            self.socket.do_handshake()
        except TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, "the TLS handshake takes long") from error
        except ssl.SSLError as error:
            raise UnauthenticatedError(f"no TLS with the peer: {error}") from error
        except OSError as error:
            raise TransferError(
                TransferReason.PEER_LOST, f"in the TLS handshake: {error}"
            ) from error

    @property
    def peer_certificate(self) -> bytes | None:
        """The certificate that the peer has shown, DER; None without TLS or certificate."""
        if not isinstance(self.socket, ssl.SSLSocket):
            return None
        return self.socket.getpeercert(binary_form=True)

    def wait(self, silence_s: float) -> bool:
        """Wait for the peer's next frame; False if the peer is done with the connection, or silent for so long."""
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return True
        try:
            poll = select.poll()
            poll.register(self.socket, select.POLLIN)
            if not poll.poll(silence_s * 1000):
                return False
            # of TLS it takes reading to know
            return isinstance(self.socket, ssl.SSLSocket) or bool(
                self.socket.recv(1, socket.MSG_PEEK)
            )
        except (OSError, ValueError):
            return False

    def first_byte(self) -> int:
        """Return the first byte that the peer sends, without taking it; before TLS only.

        Raises:
            TransferError: The peer is gone or silent.
        """
        try:
            self._arm()
            found = self.socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise _lost(error, "while waiting for a first word") from error
        if not found:
            raise TransferError(TransferReason.PEER_LOST, "the peer closed the connection")
        return found[0]

    def drain(self, budget_s: float, most_bytes: int) -> None:
        """Say nothing more and throw away what comes: closing at once would take back what was just sent."""
        deadline_s = time.monotonic() + budget_s
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            while most_bytes > 0 and (left_s := deadline_s - time.monotonic()) > 0:
                self.socket.settimeout(left_s)
                data = socket.socket.recv(self.socket, min(most_bytes, 4096))
                if not data:
                    return
                most_bytes -= len(data)

    def set_budget(self, budget_s: float, *, patient: bool = False) -> None:
        """Set how many seconds from now everything together may take; all of it in silence, if patient."""
        self._deadline_s = time.monotonic() + budget_s
        self._silence_s = budget_s if patient else self._stall_s

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline_s - time.monotonic()

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; `TransferError` if that fails or takes too long."""
        view = memoryview(data).cast("B")
        sent = 0
        try:
            while sent < len(view):
                self._arm()
                sent += self.socket.send(view[sent : sent + self._piece])
        except OSError as error:
            raise _lost(error, "while sending") from error

    @property
    def seed(self) -> int:
        """What checksums begin with that must be of this transfer; see `bind`."""
        return self._seed

    def bind(self, pull: bytes) -> None:
        """Take chunks from here on as the answer to this PULL only.

        A chunk says which layers and tokens it is, of which model, but not of which request: one that strays here from
        another transfer would fit. Its header's checksum begins with that of the request's own words.

        Args:
            pull: The PULL's body.
        """
        self._seed = zlib.crc32(pull)

    def send_chunk(self, blob: memoryview, index: int) -> None:
        """Send a chunk's frame; the index is its place in the plan."""
        self.send(pack_header(Kind.CHUNK, len(blob), index, seed=self._seed))
        self.send(blob)

    def check(self) -> None:
        """Raise if the peer has closed the connection, someone has interrupted it, or its time is over."""
        self._arm()
        try:
            poll = select.poll()
            poll.register(self.socket, select.POLLRDHUP)
            gone = bool(poll.poll(0))
        except (OSError, ValueError):
            gone = True
        if gone:
            raise TransferError(TransferReason.PEER_LOST, "the peer closed the connection")

    def receive_header(self) -> FrameHeader:
        """Receive a frame's header; those that only say that the peer is alive are passed over.

        Raises:
            TransferError: The peer is gone or silent.
            WireError: What came is not a header.
        """
        while True:
            data = bytearray(HEADER_BYTES)
            self.receive_into(memoryview(data))
            header = parse_header(bytes(data), self._seed)
            if header.kind != Kind.WAIT or header.length:
                return header

    def receive_done(self) -> None:
        """Receive the peer's word that it has everything; raises as `receive_header` does, also if it says more."""
        header = self.receive_header()
        if header.kind != Kind.DONE or header.length:
            raise WireError(WireReason.MALFORMED, f"expected DONE, got {header.kind.name}")

    def receive_body(self, header: FrameHeader) -> bytes:
        """Receive a control message's body; its length is checked before anything is allocated."""
        if header.length > MAX_MESSAGE_BYTES:
            raise WireError(WireReason.TOO_LARGE, f"a message of {header.length} bytes")
        data = bytearray(header.length)
        self.receive_into(memoryview(data))
        return bytes(data)

    def receive_into(self, view: memoryview) -> None:
        """Fill the view; `TransferError` if the peer is gone or silent."""
        done = 0
        try:
            while done < len(view):
                self._arm()
                count = self.socket.recv_into(view[done:])
                if count == 0:
                    raise TransferError(TransferReason.PEER_LOST, "the peer closed the connection")
                done += count
                self.received_bytes += count
            self._acknowledge()
        except OSError as error:
            raise _lost(error, "while receiving") from error

    def interrupt(self) -> None:
        """Make whoever waits on the connection fail at once; safe from any thread."""
        # of TLS too only the connection: its own shutdown would let another thread take ciphertext for plain bytes
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.socket.close()

    def _acknowledge(self) -> None:
        """Have the kernel acknowledge what came at once, and not 40 ms later with an answer that does not come.

        The sender takes the time to the acknowledgement for that of the link. The kernel forgets the wish.
        """
        if _TCP_QUICKACK is not None:
            self.socket.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 1)

    def _arm(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TransferError(TransferReason.TIMEOUT, "the transfer's time is over")
        self.socket.settimeout(min(left_s, self._silence_s))


def _lost(error: OSError, when: str) -> KVServeError:
    """Return what an error of a connection means."""
    if isinstance(error, TimeoutError):
        return TransferError(TransferReason.TIMEOUT, f"the peer is silent {when}")
    if not isinstance(error, ssl.SSLError) or isinstance(
        error, ssl.SSLEOFError | ssl.SSLZeroReturnError
    ):
        return TransferError(TransferReason.PEER_LOST, f"{when}: {error}")
    if "BAD_RECORD_MAC" in (error.reason or ""):
        return WireError(WireReason.CHECKSUM_MISMATCH, f"{when}: {error}")
    # in TLS 1.3 a client learns here that its certificate was refused
    if "ALERT" in (error.reason or ""):
        return UnauthenticatedError(f"the peer ended TLS: {error}")
    return WireError(WireReason.MALFORMED, f"{when}: {error}")
