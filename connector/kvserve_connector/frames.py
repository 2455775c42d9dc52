"""Frames over a TCP connection, with a deadline for the whole and a limit for silence."""

import contextlib
import socket
import time
from typing import Final

from kvserve_api.errors import TransferError, TransferReason, WireError, WireReason
from kvserve_connector.protocol import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    FrameHeader,
    Kind,
    pack_header,
    parse_header,
)

_TCP_NOTSENT_LOWAT: Final = 25
_UNSENT: Final = 256 << 10
_PIECE: Final = 256 << 10
"""Bytes handed to the kernel at once: small enough that a lost peer is noticed by ``stall_s``."""


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
                sent += self.socket.send(view[sent : sent + _PIECE])
        except TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, "the peer takes no more bytes") from error
        except OSError as error:
            raise TransferError(TransferReason.PEER_LOST, f"while sending: {error}") from error

    def send_chunk(self, blob: memoryview, index: int) -> None:
        """Send a chunk's frame; the index is its place in the plan."""
        self.send(pack_header(Kind.CHUNK, len(blob), index))
        self.send(blob)

    def receive_header(self) -> FrameHeader:
        """Receive a frame's header; those that only say that the peer is alive are passed over.

        Raises:
            TransferError: The peer is gone or silent.
            WireError: What came is not a header.
        """
        while True:
            data = bytearray(HEADER_BYTES)
            self.receive_into(memoryview(data))
            header = parse_header(bytes(data))
            if header.kind != Kind.WAIT or header.length:
                return header

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
        except TimeoutError as error:
            raise TransferError(TransferReason.TIMEOUT, "the peer sends nothing") from error
        except OSError as error:
            raise TransferError(TransferReason.PEER_LOST, f"while receiving: {error}") from error

    def interrupt(self) -> None:
        """Make whoever waits on the connection fail at once; safe from any thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.socket.close()

    def _arm(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TransferError(TransferReason.TIMEOUT, "the transfer's time is over")
        self.socket.settimeout(min(left_s, self._silence_s))
