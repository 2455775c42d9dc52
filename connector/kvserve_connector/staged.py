"""Chunks that a consumer reads out of the producer's staging memory by NIXL.

The producer copies a chunk there, piece by piece, and says on the connection where each piece is (STAGED); the consumer
reads it and says so (TAKEN), which makes room for the next. Pieces are answered in the order in which they were told.
"""

from collections import deque
from typing import Final

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.carriers import check_size
from kvserve_connector.config import NIXL
from kvserve_connector.frames import FrameSocket
from kvserve_connector.links import LinkState
from kvserve_connector.pieces import (
    STAGED_BYTES,
    TAKEN_BYTES,
    Offer,
    pack_staged,
    pack_taken,
    parse_staged,
    parse_taken,
)
from kvserve_connector.protocol import FrameHeader, Kind, pack_header
from kvserve_connector.staging import PIECE_BYTES, Reader, Staging

WINDOW: Final = 4
"""Pieces of one transfer that may wait to be read: enough to copy one while another is read."""
WORD_S: Final = 1.0
"""So often at least a consumer is told that the producer waits for room."""


class StagedSender:
    """Stages chunks for a consumer.

    Args:
        frames: The connection.
        link: What is known of the way to the consumer.
        staging: The memory.
        stall_s: Most seconds without a word.
    """

    name = NIXL

    def __init__(
        self, frames: FrameSocket, link: LinkState, staging: Staging, stall_s: float
    ) -> None:
        self._frames = frames
        self._link = link
        self._staging = staging
        self._word_s = min(WORD_S, stall_s / 3)
        self._told: deque[tuple[int, int, int]] = deque()
        self.offer: Offer | None = Offer(agent=staging.agent, metadata=staging.metadata)

    def send(self, blob: memoryview, index: int) -> None:
        """See `Sender`."""
        blob = blob.cast("B")
        for start in range(0, len(blob), PIECE_BYTES):
            part = blob[start : start + PIECE_BYTES]
            piece = self._room()
            self._told.append((piece, index, len(part)))
            self._staging.view(piece)[: len(part)] = part
            address = self._staging.address(piece)
            self._frames.send(pack_staged(index, address, len(blob), seed=self._frames.seed))

    def finish(self) -> None:
        """See `Sender`."""
        while self._told:
            self._hear()

    def close(self) -> None:
        """See `Sender`."""
        # a consumer that still reads them gets another transfer's bytes, but never an END of this one
        while self._told:
            self._staging.give(self._told.popleft()[0])

    def _room(self) -> int:
        if len(self._told) >= WINDOW:
            self._hear()
        while True:
            piece = self._staging.take(0 if self._told else self._word_s)
            if piece is not None:
                return piece
            if self._told:
                self._hear()
            else:
                # others have all of it
                self._frames.send(pack_header(Kind.WAIT, 0))

    def _hear(self) -> None:
        """Wait for the word that the first piece has been read."""
        header = self._frames.receive_header()
        piece, index, length = self._told[0]
        if header.kind != Kind.TAKEN or header.length != TAKEN_BYTES or header.index != index:
            raise WireError(WireReason.MALFORMED, f"expected TAKEN, got {header.kind.name}")
        taken_s = parse_taken(self._frames.receive_body(header))
        self._told.popleft()
        self._staging.give(piece)
        self._link.observe(length, taken_s)


class StagedReceiver:
    """Reads chunks that a producer has staged.

    Args:
        frames: The connection.
        reader: What reads.
        offer: What the producer said of its memory.
        stall_s: Most seconds of a piece.

    Raises:
        WireError: The offer can't be used.
    """

    name = NIXL
    kind = Kind.STAGED

    def __init__(self, frames: FrameSocket, reader: Reader, offer: Offer, stall_s: float) -> None:
        self._frames = frames
        self._reader = reader
        self._agent = offer.agent
        self._stall_s = stall_s
        reader.enter(offer.agent, offer.metadata)

    def receive(self, header: FrameHeader, most_bytes: int) -> bytearray:
        """See `Receiver`."""
        index = header.index
        address, length = self._where(header)
        check_size(length, most_bytes)
        blob = bytearray(length)
        view = memoryview(blob)
        done = 0
        while True:
            part = view[done : done + PIECE_BYTES]
            taken_s = self._reader.read(
                self._agent,
                address,
                part,
                stall_s=self._stall_s,
                left_s=lambda: self._frames.left_s,
                check=self._frames.check,
            )
            self._frames.received_bytes += len(part)
            self._frames.send(pack_taken(index, taken_s))
            done += len(part)
            if done == length:
                return blob
            header = self._frames.receive_header()
            if header.kind != Kind.STAGED or header.index != index:
                raise WireError(
                    WireReason.MALFORMED, f"expected the rest of chunk {index}, got {header}"
                )
            address, again = self._where(header)
            if again != length:
                raise WireError(WireReason.MALFORMED, f"chunk {index} has {again} bytes now")

    def close(self) -> None:
        """See `Receiver`."""
        self._reader.leave(self._agent)

    def _where(self, header: FrameHeader) -> tuple[int, int]:
        if header.length != STAGED_BYTES:
            raise WireError(WireReason.MALFORMED, f"STAGED with {header.length} bytes")
        return parse_staged(self._frames.receive_body(header), self._frames.seed)
