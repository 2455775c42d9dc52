"""A table in force and the pods that have not answered it yet."""

from collections.abc import Iterable

from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import push_from_table
from kvserve_api.table import DecisionTable, Role
from kvserve_controller.match import Pod
from kvserve_controller.session import Session


class Offer:
    """A table in force, and who has not answered it yet.

    Attributes:
        table: The table.
        fingerprint: Of the model that was profiled; empty if unknown.
        waiting: The Decode pods that its Prefill pods wait for.
        unanswered: All pods that were connected when it was offered and have neither answered nor gone.
        pods: How many there were.
        message: What is sent to each of them: its nonce tells offers apart, and a pod has one on its way at most.
    """

    def __init__(
        self, table: DecisionTable, fingerprint: str, members: Iterable[Session], nonce: str
    ) -> None:
        self.table = table
        self.fingerprint = fingerprint
        self.unanswered = {session for session in members if self.suits(session.pod)}
        self.waiting = {
            session
            for session in self.unanswered
            if session.pod.role is Role.DECODE and not session.silent
        }
        self.pods = len(self.unanswered)
        self.message = pb.ControllerMessage(push=push_from_table(table, nonce))

    def is_turn_of(self, session: Session) -> bool:
        """Tell whether a pod may have the table now: Decode pods at once, others when no Decode pod is waited for."""
        return session.pod.role is Role.DECODE or not self.waiting

    def suits(self, pod: Pod) -> bool:
        """Tell whether the pod serves the model that was profiled, as far as both say."""
        return not (self.fingerprint and pod.model_fingerprint) or (
            self.fingerprint == pod.model_fingerprint
        )
