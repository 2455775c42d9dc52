"""How a producer finds out that a link has become faster that small transfers leave idle.

Chunks that each fit into what shapers let pass at once say nothing of a link's rate once it no longer keeps them
waiting: a link that has recovered would be taken for slow for as long as what is sent over it is small, and it is small
because the link is taken for slow. So at the end of such a transfer the producer says that it would like to know, and
when the consumer has its KV, it asks for some bytes more, which it throws away:

    consumer                      producer
                            ←     END {probe}
    DONE                    →
    PROBE                   →     (after the request has gone on)
                            ←     PADDING bytes  (as often as it takes)
                            ←     PADDING        (without bytes: that was all)
    DONE                    →

Nothing waits for them: they stop when a transfer wants the link, and they get a bounded share of its time. Most of them
are sent only if the first ones show that the link is at least twice as fast as was thought.
"""

import time
from typing import Final

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.frames import FrameSocket
from kvserve_connector.links import BURST_BYTES, LinkState
from kvserve_connector.protocol import Kind, pack_header
from kvserve_connector.tcp_account import TcpProgress

PROBE_BYTES: Final = 8 * BURST_BYTES
"""Most bytes of a probe."""
FIRST_BYTES: Final = 2 * BURST_BYTES
"""What is sent of it at first."""
BUDGET_S: Final = 2.0
"""Most seconds for all of it, to the last answer."""
_PIECE_BYTES: Final = 64 << 10
_PADDING: Final = bytes(_PIECE_BYTES)
_POLL_S: Final = 1e-3


def goes_on(took_s: float, known_bytes_per_s: float) -> bool:
    """Tell whether a probe is worth its rest: what is no burst of its beginning came twice as fast as was thought.

    Args:
        took_s: In how many seconds the first `FIRST_BYTES` arrived.
        known_bytes_per_s: What was thought of the link.
    """
    return 2 * took_s * known_bytes_per_s < FIRST_BYTES - BURST_BYTES


def send_padding(frames: FrameSocket, link: LinkState) -> int:
    """Answer PROBE, with nothing if that was not wished for, and return how many bytes it took.

    Args:
        frames: The connection, on which PROBE has come.
        link: The link to learn of.

    Raises:
        TransferError: The consumer is gone or silent.
        WireError: It says something else.
    """
    frames.set_budget(BUDGET_S)
    started_s = time.monotonic()
    sent = 0
    if wished := link.begin_probe():
        link.attach(frames.socket)
    try:
        if wished:
            sent = _send(frames, link)
        frames.send(pack_header(Kind.PADDING, 0))
        frames.receive_done()
    finally:
        if wished:
            link.detach(frames.socket)
            link.end_probe(time.monotonic() - started_s)
    return sent


def _send(frames: FrameSocket, link: LinkState) -> int:
    """Send as much as is worth it, and return how much that is."""
    known_bytes_per_s = link.goodput_bytes_per_s or 0.0
    before = TcpProgress.of(frames.socket)
    started_s = time.monotonic()
    sent = 0
    while sent < PROBE_BYTES and not link.wanted:
        if sent == FIRST_BYTES and not (
            before is not None
            and _arrives(frames, link, before.acked_bytes + sent)
            and goes_on(time.monotonic() - started_s - before.min_rtt_s, known_bytes_per_s)
        ):
            break
        frames.send(pack_header(Kind.PADDING, _PIECE_BYTES))
        frames.send(_PADDING)
        sent += _PIECE_BYTES
    return sent


def _arrives(frames: FrameSocket, link: LinkState, acked_bytes: int) -> bool:
    """Wait until so many bytes have arrived; False if something else wants the link, or it takes too long."""
    while not link.wanted and frames.left_s > BUDGET_S / 2:
        now = TcpProgress.of(frames.socket)
        if now is None:
            return False
        if now.acked_bytes >= acked_bytes:
            return True
        time.sleep(_POLL_S)
    return False


def take_padding(frames: FrameSocket) -> int:
    """Ask for what shows a producer how fast its link is, throw it away, and return how much it was.

    Args:
        frames: The connection, on which a transfer has ended.

    Raises:
        TransferError: The producer is gone or silent.
        WireError: It sends something else, or too much.
    """
    frames.set_budget(BUDGET_S)
    frames.send(pack_header(Kind.PROBE, 0))
    room = memoryview(bytearray(_PIECE_BYTES))
    taken = 0
    while True:
        header = frames.receive_header()
        if header.kind != Kind.PADDING:
            raise WireError(WireReason.MALFORMED, f"expected PADDING, got {header.kind.name}")
        taken += header.length
        if header.length > _PIECE_BYTES or taken > PROBE_BYTES:
            raise WireError(WireReason.TOO_LARGE, f"a probe of {taken} bytes or more")
        if not header.length:
            frames.send(pack_header(Kind.DONE, 0))
            return taken
        frames.receive_into(room[: header.length])
