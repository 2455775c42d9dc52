"""Which profile a policy's transfers use, since when, and the history of changes."""

import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, Self

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_api.table import Version

MAX_SWITCHES: Final = 10
LINK_CHANGE: Final = 0.2
"""Relative change of the goodput above which a switch is explained by the link."""


class Cause(StrEnum):
    """Why a table was compiled, or why the profile in use changed."""

    STARTED = "Started"
    POLICY = "PolicyChanged"
    PROFILES = "ProfilesChanged"
    LEARNED = "Relearned"
    REISSUED = "Reissued"
    LINK_SLOWER = "LinkSlower"
    LINK_FASTER = "LinkFaster"
    TRAFFIC = "TrafficChanged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """A change of the profile in use.

    Attributes:
        time: RFC 3339, UTC, whole seconds.
        before: The profile before; empty for the first.
        after: The profile since then.
        cause: Why, as one word.
        version: Of the table in force.
    """

    time: str
    before: str
    after: str
    cause: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``status.history``."""
        value = {
            "time": self.time,
            "from": self.before,
            "to": self.after,
            "reason": self.cause,
            "version": self.version,
        }
        return {key: item for key, item in value.items() if item}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read an entry of ``status.history``."""
        switch = cls(
            time=fields.string("time", max_length=64),
            before=fields.string("from", "", max_length=63),
            after=fields.string("to", max_length=63),
            cause=fields.string("reason", max_length=63),
            version=fields.string("version", "", max_length=48),
        )
        fields.done()
        return switch


def timestamp(wall_s: float) -> str:
    """Return a time in seconds since 1970 as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Activity:
    """The profile in use and how it came to be.

    Attributes:
        history: The latest changes, newest first.
    """

    def __init__(self, history: tuple[Switch, ...] = ()) -> None:
        self.history = history[:MAX_SWITCHES]
        self._cause: Cause | None = None
        self._log_goodput = 0.0
        self._goodputs = 0

    @classmethod
    def restore(cls, status: Any) -> Self:
        """Take up the history that an earlier controller published; an unreadable one is dropped."""
        try:
            entries = Fields(status).children("history", [], max_items=MAX_SWITCHES)
            return cls(tuple(Switch.from_json(entry) for entry in entries))
        except SpecError:
            return cls()

    @property
    def profile(self) -> str | None:
        """The profile in use; None before the first table."""
        return self.history[0].after if self.history else None

    def compiled(self, cause: Cause) -> None:
        """Note that a new table may change the profile; what a person did outweighs what was learned."""
        if self._cause not in (Cause.POLICY, Cause.PROFILES):
            self._cause = cause

    def observe_goodput(self, bytes_per_s: float) -> None:
        """Note a link's goodput while the profile is in use."""
        if bytes_per_s > 0:
            self._log_goodput += math.log(bytes_per_s)
            self._goodputs += 1

    def update(
        self,
        usage: Counter[str],
        *,
        possible: frozenset[str],
        predicted: str,
        goodput_bytes_per_s: float,
        version: Version,
        settled: bool,
        wall_s: float,
    ) -> None:
        """Note what recent transfers used; another profile must be used by more than half of them to take over.

        Args:
            usage: How often each profile was used lately.
            possible: The profiles that the table in force can lead to; others count no more.
            predicted: The profile to expect where no transfer tells.
            goodput_bytes_per_s: Of the links lately, or the prior.
            version: Of the table in force.
            settled: All of the recent transfers were decided by that table.
            wall_s: Seconds since 1970.
        """
        counted = Counter({name: n for name, n in usage.items() if name in possible})
        current = self.profile if self.profile in possible else None
        profile = current or predicted
        if counted:
            most, count = counted.most_common(1)[0]
            undecided = count * 2 <= counted.total() and current in counted
            profile = current if undecided and current is not None else most
        if profile == self.profile:
            if settled:
                self._cause = None
            return
        switch = Switch(
            time=timestamp(wall_s),
            before=self.profile or "",
            after=profile,
            cause=self._explain(goodput_bytes_per_s),
            version=str(version),
        )
        self.history = (switch, *self.history)[:MAX_SWITCHES]
        self._cause = None
        self._log_goodput, self._goodputs = math.log(goodput_bytes_per_s), 1

    def _explain(self, goodput_bytes_per_s: float) -> Cause:
        if self.profile is None:
            return Cause.STARTED
        if self._cause in (Cause.POLICY, Cause.PROFILES):
            return self._cause
        if self._goodputs:
            change = goodput_bytes_per_s / math.exp(self._log_goodput / self._goodputs)
            if change < 1 / (1 + LINK_CHANGE):
                return Cause.LINK_SLOWER
            if change > 1 + LINK_CHANGE:
                return Cause.LINK_FASTER
        return self._cause if self._cause is Cause.LEARNED else Cause.TRAFFIC
