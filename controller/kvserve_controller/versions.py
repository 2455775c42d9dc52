"""Versions of tables, which never go back: not over restarts, and not below what any pod holds."""

from typing import Final

from kvserve_api.errors import SpecError
from kvserve_api.table import Version

MAX_EPOCH: Final = 1 << 50
"""Epochs are milliseconds since 1970; a pod that announces a later one than this (year 37648) is not believed."""


class VersionClock:
    """Hands out versions.

    The epoch is the millisecond the controller started in: two starts within one second are two epochs. Should a pod
    announce a version from a later one, because clocks differ or go back, the epoch is raised above it.
    """

    def __init__(self, start_s: float) -> None:
        self._epoch = int(start_s * 1000)
        self._counter = 0

    @property
    def last(self) -> Version:
        """The last version that was handed out."""
        return Version(epoch=self._epoch, counter=self._counter)

    def next(self) -> Version:
        """Return a version above all before it."""
        self._counter += 1
        return Version(epoch=self._epoch, counter=self._counter)

    def raise_above(self, announced: Version) -> None:
        """Make the next version higher than one that a pod holds.

        Raises:
            SpecError: The epoch is not a time.
        """
        if announced.epoch >= MAX_EPOCH:
            raise SpecError("version.epoch", f"must be below {MAX_EPOCH}, got {announced.epoch}")
        if announced > Version(epoch=self._epoch, counter=self._counter):
            self._epoch = announced.epoch + 1
            self._counter = 0
