"""How the pods of a policy stand to its table in force."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from kvserve_controller.offer import Offer
from kvserve_controller.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The pods of one role of a policy.

    Attributes:
        connected: With an open stream.
        synced: That acknowledged the table in force.
        rejected: That refused it, or serve another model than was profiled.
        message: Why; empty if none did.
    """

    connected: int = 0
    synced: int = 0
    rejected: int = 0
    message: str = ""

    @property
    def stale(self) -> int:
        """Pods that hold an earlier table or none."""
        return self.connected - self.synced - self.rejected

    @classmethod
    def of(cls, offer: Offer | None, sessions: Sequence[Session]) -> Self:
        """Count the pods of one role; without a table in force they are connected and nothing else."""
        if offer is None:
            return cls(connected=len(sessions))
        version = offer.table.version
        problems = []
        synced = 0
        for session in sessions:
            rejection = session.rejection
            if not offer.suits(session.pod):
                problems.append(
                    f"{session.pod.name}: serves another model than was profiled"
                    f" (fingerprint {session.pod.model_fingerprint}, not {offer.fingerprint})"
                )
            elif rejection is not None and rejection.version == version:
                problems.append(f"{session.pod.name}: {rejection.reason}: {rejection.detail}")
            elif session.acked == version:
                synced += 1
        return cls(
            connected=len(sessions),
            synced=synced,
            rejected=len(problems),
            message="; ".join(problems[:3]),
        )
