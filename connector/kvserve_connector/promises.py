"""What a transfer will ask of link, coders and consumer, while it has not been done."""

from dataclasses import dataclass

from kvserve_connector.links import LinkState
from kvserve_connector.loads import Coders


@dataclass(slots=True)
class Promise:
    """One transfer's part of what link, coders and consumer are to do; taken back as it is done.

    Attributes:
        link: The link.
        coders: What encodes.
        wire_bytes: Expected on the wire, of the whole transfer.
        encode_s: Expected of encoding it, in seconds of one thread.
        decode_s: Expected of decoding it, in seconds of one thread.
        left: Share of the transfer that is still to be done.
    """

    link: LinkState
    coders: Coders
    wire_bytes: float
    encode_s: float
    decode_s: float
    left: float = 0.0

    def make(self, share: float = 1.0) -> None:
        """Promise a share of the transfer, by default all of it."""
        self._add(share)

    def keep(self, share: float) -> None:
        """A share of the transfer is done, or not to be done as promised."""
        self._add(-min(share, self.left))

    def end(self) -> None:
        """Nothing more is to be done, however the transfer went."""
        self._add(-self.left)

    def _add(self, share: float) -> None:
        self.left += share
        self.link.queue(share * self.wire_bytes, share * self.decode_s)
        self.coders.promise(share * self.encode_s)
