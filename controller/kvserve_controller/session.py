"""One pod's open stream, as the hub of the push channel knows it."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from kvserve_api.table import Version
from kvserve_controller.match import Pod


class Ending(StrEnum):
    """Why the controller ends a stream; the words are names of gRPC status codes."""

    SILENT = "DEADLINE_EXCEEDED"
    REPLACED = "ABORTED"
    WRONG_ROLE = "FAILED_PRECONDITION"
    STOPPING = "UNAVAILABLE"


class Outcome(StrEnum):
    """What became of a push."""

    ACK = "ack"
    NACK = "nack"
    TIMEOUT = "timeout"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A pod's refusal of a table.

    Attributes:
        version: The table's.
        reason: A word of the catalogue of errors.
        detail: More about it, for people.
        retry_s: When to send the same table again; None for never.
    """

    version: Version
    reason: str
    detail: str
    retry_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A table on its way to a pod, not answered yet."""

    version: Version
    nonce: str
    at_s: float


class Session:
    """One pod's open stream.

    Attributes:
        pod: Who it is.
        policy: The policy it belongs to; None if there is none.
        held: The version the pod has in force, as far as known.
        acked: The last version it acknowledged on this stream.
        sent: What it has not answered yet.
        silent: That is a while ago: nobody waits for the answer.
        rejection: What it refused last.
        ending: Why the stream is to be closed, and what to tell the pod; None while it stays open.
        wake: Set when there may be something to send.
    """

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self.policy: str | None = None
        self.held = pod.version
        self.acked: Version | None = None
        self.sent: Sent | None = None
        self.silent = False
        self.rejection: Rejection | None = None
        self.ending: tuple[Ending, str] | None = None
        self.wake = asyncio.Event()
        self.last_sent_s = 0.0

    def end(self, ending: Ending, detail: str) -> None:
        """Have the stream closed."""
        if self.ending is None:
            self.ending = (ending, detail)
        self.wake.set()

    def has_answered(self, version: Version) -> bool:
        """Tell whether the pod has acknowledged or refused a version."""
        refused = self.rejection is not None and self.rejection.version == version
        return refused or self.acked == version

    def retry_s(self, version: Version) -> float | None:
        """Return when to send a version again that the pod refused for now; None if it did not."""
        rejection = self.rejection
        return rejection.retry_s if rejection and rejection.version == version else None
