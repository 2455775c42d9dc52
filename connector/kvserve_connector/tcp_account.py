"""The kernel's own account of what a TCP connection has sent (``TCP_INFO``)."""

import socket
import struct
import sys
from typing import Final, NamedTuple, Self

_TCP_INFO: Final = 11
# of struct tcp_info in linux/tcp.h, which only ever grows at its end: bytes_acked, min_rtt, delivery_rate, busy_time,
# rwnd_limited
_ACCOUNT: Final = struct.Struct("<Q20xI8x3Q")
_ACCOUNT_AT: Final = 120
_ACCOUNT_END: Final = _ACCOUNT_AT + _ACCOUNT.size
_INFO_BYTES: Final = 192
_UNMEASURED_US: Final = 0xFFFFFFFF
_TCP: Final = socket.IPPROTO_TCP
_LINUX: Final = sys.platform == "linux"


class TcpProgress(NamedTuple):
    """The kernel's own account of what one connection has sent; read for every choice, so it must cost little.

    Attributes:
        acked_bytes: Bytes the other side has acknowledged.
        min_rtt_us: Least round trip, in microseconds; `_UNMEASURED_US` while there was none.
        delivery_bytes_per_s: The kernel's own latest estimate.
        sending_us: Microseconds in which data was on its way or waiting for the link or a slow reader.
        reader_us: Those of them in which it waited for a slow reader.
    """

    acked_bytes: int
    min_rtt_us: int
    delivery_bytes_per_s: int
    sending_us: int
    reader_us: int

    @classmethod
    def of(cls, connection: socket.socket) -> Self | None:
        """Read it; None where the kernel keeps no such account."""
        if not _LINUX:
            return None
        try:
            info = connection.getsockopt(_TCP, _TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        if len(info) < _ACCOUNT_END:
            return None
        return tuple.__new__(cls, _ACCOUNT.unpack_from(info, _ACCOUNT_AT))

    @property
    def busy_s(self) -> float:
        """Seconds in which data was on its way or waiting for the link; waiting for a slow reader not counted."""
        return max(0, self.sending_us - self.reader_us) / 1e6

    @property
    def min_rtt_s(self) -> float:
        """Least round trip, in seconds; 0 while there was none."""
        return 0.0 if self.min_rtt_us == _UNMEASURED_US else self.min_rtt_us / 1e6
