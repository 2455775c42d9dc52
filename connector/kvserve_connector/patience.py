"""Waiting for a prefill, and for its chunks, on behalf of a consumer."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kvserve_api.errors import TransferError, TransferReason
from kvserve_connector.frames import FrameSocket
from kvserve_connector.leases import LeaseBook
from kvserve_connector.protocol import Kind, pack_header

T = TypeVar("T")


class Patience:
    """Waits for one prefill, and tells its consumer every now and then that it has not been forgotten.

    Args:
        leases: Where the prefill is.
        frames: The connection to the consumer.
        every_s: How often, in seconds.
        closed: Tells whether the producer ends.

    Attributes:
        waited_s: Seconds waited so far.
    """

    def __init__(
        self,
        leases: LeaseBook,
        frames: FrameSocket,
        every_s: float,
        closed: Callable[[], bool],
    ) -> None:
        self._leases = leases
        self._frames = frames
        self._every_s = every_s
        self._closed = closed
        self._begun_s = time.monotonic()
        self.waited_s = 0.0

    @property
    def spent_s(self) -> float:
        """Seconds since the consumer has asked."""
        return time.monotonic() - self._begun_s

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that changes as the prefill goes on."""
        start_s = time.monotonic()
        while not self._leases.wait(holds, self._every_s):
            self._tell()
        self.waited_s += time.monotonic() - start_s

    def result(self, future: Future[T]) -> T:
        """Wait for a chunk that is being coded, or behind those of other transfers."""
        while True:
            try:
                return future.result(self._every_s)
            except TimeoutError:
                if future.done():
                    raise
                self._tell()

    def _tell(self) -> None:
        if self._closed():
            raise TransferError(TransferReason.CANCELLED, "the producer ends")
        # fails when the consumer is gone, or its time is over
        self._frames.send(pack_header(Kind.WAIT, 0))
