"""What a transfer will ask of link, coders and consumer, while it has not been done."""

import threading
from dataclasses import dataclass, field

from kvserve_connector.links import LinkState
from kvserve_connector.loads import Coders


@dataclass(slots=True)
class Promise:
    """One transfer's part of what link, coders and consumer are to do; taken back as it is done.

    Chunks are coded before they are sent, by other threads than the one that sends: what is coded is no longer ahead of
    others at the coders, though it still is on the link.

    Attributes:
        link: The link.
        coders: What encodes.
        wire_bytes: Expected on the wire, of the whole transfer.
        encode_s: Expected of encoding it, in seconds of one thread.
        decode_s: Expected of decoding it, in seconds of one thread.
        left: Share of the transfer that is still to be sent.
        uncoded: Share of it that is still to be encoded.
    """

    link: LinkState
    coders: Coders
    wire_bytes: float
    encode_s: float
    decode_s: float
    left: float = 0.0
    uncoded: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def make(self, share: float = 1.0) -> None:
        """Promise a share of the transfer, by default all of it."""
        self._send(share)
        self._code(share)

    def coded(self, share: float) -> None:
        """A share of the transfer is encoded; from any thread."""
        self._code(-share)

    def keep(self, share: float) -> None:
        """A share of the transfer, encoded before, is sent."""
        self._send(-share)

    def withdraw(self, share: float) -> None:
        """A share of the transfer that nobody has begun is not to be done as promised."""
        self._send(-share)
        self._code(-share)

    def end(self) -> None:
        """Nothing more is to be done, however the transfer went."""
        self._send(-self.left)
        self._code(-self.uncoded)

    def _send(self, share: float) -> None:
        share = max(share, -self.left)
        self.left += share
        self.link.queue(share * self.wire_bytes, share * self.decode_s)

    def _code(self, share: float) -> None:
        with self._lock:
            share = max(share, -self.uncoded)
            self.uncoded += share
        self.coders.promise(share * self.encode_s)
