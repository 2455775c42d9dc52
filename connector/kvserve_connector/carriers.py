"""How the bytes of chunks go from a producer to a consumer: over the connection itself, or read by NIXL.

The words about a transfer always go over the connection, which is bounded in time and authenticated. A carrier moves
only what is inside the chunks, and both kinds deliver the same bytes to the same checks.
"""

from typing import Protocol

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.config import TCP
from kvserve_connector.frames import FrameSocket
from kvserve_connector.links import LinkState
from kvserve_connector.pieces import Offer
from kvserve_connector.protocol import FrameHeader, Kind


class Sender(Protocol):
    """A producer's end, for one transfer."""

    @property
    def name(self) -> str:
        """What the setting `transport` calls it."""
        ...

    @property
    def offer(self) -> Offer | None:
        """What the consumer must know to fetch the chunks; None if they come by themselves."""
        ...

    def send(self, blob: memoryview, index: int) -> None:
        """Send a chunk; the index is its place in the plan.

        Raises:
            TransferError: The consumer is gone or silent, or the time is over.
        """
        ...

    def finish(self) -> None:
        """Wait until nothing more is needed of the chunks here; raises as `send`."""
        ...

    def close(self) -> None:
        """Let go of everything, however the transfer went."""
        ...


class Receiver(Protocol):
    """A consumer's end, for one transfer."""

    @property
    def name(self) -> str:
        """What the setting `transport` calls it."""
        ...

    @property
    def kind(self) -> Kind:
        """The frame that announces a chunk."""
        ...

    def receive(self, header: FrameHeader, most_bytes: int) -> bytearray:
        """Return a chunk's bytes; nothing is allocated before its size is checked.

        Args:
            header: The frame that announces it.
            most_bytes: How many it may have.

        Raises:
            WireError: It is too large, or announced wrongly.
            TransferError: The producer is gone or silent, or the time is over.
        """
        ...

    def close(self) -> None:
        """Let go of everything, however the transfer went."""
        ...


class TcpSender:
    """Sends chunks as frames, and has the kernel tell how fast the link is.

    Args:
        frames: The connection.
        link: What is known of it.
    """

    name = TCP
    offer: Offer | None = None

    def __init__(self, frames: FrameSocket, link: LinkState) -> None:
        self._frames = frames
        self._link = link
        link.attach(frames.socket)

    def send(self, blob: memoryview, index: int) -> None:
        """See `Sender`."""
        self._frames.send_chunk(blob, index)
        self._link.sample(self._frames.socket)

    def finish(self) -> None:
        """Do nothing: the kernel has the bytes."""

    def close(self) -> None:
        """See `Sender`."""
        self._link.detach(self._frames.socket)


class TcpReceiver:
    """Receives chunks as frames.

    Args:
        frames: The connection.
    """

    name = TCP
    kind = Kind.CHUNK

    def __init__(self, frames: FrameSocket) -> None:
        self._frames = frames

    def receive(self, header: FrameHeader, most_bytes: int) -> bytearray:
        """See `Receiver`."""
        check_size(header.length, most_bytes)
        blob = bytearray(header.length)
        self._frames.receive_into(memoryview(blob))
        return blob

    def close(self) -> None:
        """Do nothing."""


def check_size(length: int, most_bytes: int) -> None:
    """Refuse a chunk that is larger than it may be."""
    if length > most_bytes:
        raise WireError(WireReason.TOO_LARGE, f"a chunk of {length} bytes")
