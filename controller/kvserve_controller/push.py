"""The state of the push channel: which pod is sent what, and when. No I/O and no clock of its own.

`service` reads and writes the streams; here is decided. A table is sent to a policy's Decode pods first, and to its
Prefill pods when every Decode pod that was connected at that time has answered, is gone, or has been silent for a
while.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from kvserve_api.errors import PolicyError, UnavailableError
from kvserve_api.policy import Policy
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.rpc.messages import version_to_message
from kvserve_api.table import DecisionTable, Role, Version
from kvserve_controller.counts import Counts
from kvserve_controller.match import Pod, match, selecting
from kvserve_controller.offer import Offer
from kvserve_controller.refusals import Refusals
from kvserve_controller.session import Ending, Outcome, Rejection, Sent, Session

ACK_TIMEOUT_S: Final = 30.0
"""How long a pod may take to answer a table before its stream is closed; it may have to compile kernels first."""
SILENT_S: Final = 2.0
"""After how long without an answer a Decode pod is not waited for any more, until it answers; its stream stays open."""
RETRY_S: Final = 30.0
"""After how long a table is sent again to a pod that could not get its calibration bundles at that time."""
MAX_STREAMS: Final = 8192
MAX_DETAIL: Final = 512
HEARTBEATS_PER_TTL: Final = 3


Answered: TypeAlias = Callable[[str, Outcome], None]
Settled: TypeAlias = Callable[[str, Version, int], None]


def _nothing(_policy: str, _version: Version, _pods: int) -> None:
    """Do nothing."""


class Hub:
    """All streams and all tables in force.

    Attributes:
        synced: The policies are known: pods that none of them wants may be told so.
        sessions: The open streams, by pod.
    """

    def __init__(
        self,
        *,
        on_answer: Answered,
        on_behind: Callable[[str], None],
        on_settled: Settled = _nothing,
        ack_timeout_s: float = ACK_TIMEOUT_S,
    ) -> None:
        """Make a hub without streams.

        Args:
            on_answer: Called with the policy and what became of a push.
            on_behind: Called with a policy of whose table a pod holds a higher version; it must offer a higher one.
            on_settled: Called with a policy, the version of its table in force and a number of pods when all that were
                connected when it was offered have answered or are gone.
            ack_timeout_s: How long a pod may take to answer.
        """
        self.synced = False
        self.sessions: dict[str, Session] = {}
        self._by_policy: dict[str, dict[str, Session]] = {}
        self._offers: dict[str, Offer] = {}
        self._policies: Mapping[str, Policy] = {}
        self._refusals = Refusals()
        self._numbers = 0
        self._on_answer = on_answer
        self._on_behind = on_behind
        self._on_settled = on_settled
        self._ack_timeout_s = ack_timeout_s

    def connect(self, pod: Pod) -> Session:
        """Open a stream; an older one of the same pod is ended.

        Raises:
            UnavailableError: There are too many streams.
            PolicyError: The pod's policy has it in the other role.
        """
        old = self.sessions.get(pod.key)
        if old is None and len(self.sessions) >= MAX_STREAMS:
            raise UnavailableError(f"this controller serves {MAX_STREAMS} streams already")
        session = Session(pod)
        session.rejection = self._refusals.of(pod)
        policy = match(pod, self._policies)
        if old is not None:
            old.end(Ending.REPLACED, f"pod {pod.key} opened a newer stream")
            self._forget(old)
        self.sessions[pod.key] = session
        self._join(session, policy)
        return session

    def disconnect(self, session: Session) -> None:
        """Close a stream."""
        if self.sessions.get(session.pod.key) is session:
            self._forget(session)

    def stop(self) -> None:
        """End all streams, because the controller ends; pods hold their tables."""
        for session in self.sessions.values():
            session.end(Ending.STOPPING, "the controller is stopping")

    def rematch(self, policies: Mapping[str, Policy]) -> None:
        """Follow a change of the policies, given in the order in which they win."""
        told = self.synced and selecting(policies) == selecting(self._policies)
        self._policies = policies
        self.synced = True
        if told:
            # most changes of a policy are not about which pods it selects: a thousand need not be matched anew
            return
        for session in self.sessions.values():
            try:
                policy = match(session.pod, policies)
            except PolicyError as error:
                session.end(Ending.WRONG_ROLE, str(error))
                policy = None
            if policy != session.policy:
                self._leave(session)
                self._join(session, policy)
            session.wake.set()

    def offer(self, policy: str, table: DecisionTable, fingerprint: str) -> None:
        """Put a table in force: it is pushed to the policy's pods, Decode before Prefill."""
        members = self._by_policy.get(policy, {}).values()
        self._numbers += 1
        offer = Offer(table, fingerprint, members, str(self._numbers))
        self._offers[policy] = offer
        # a Prefill pod whose turn it is not would find nothing to do
        self._wake(s for s in members if s not in offer.unanswered or offer.is_turn_of(s))

    def withdraw(self, policy: str) -> None:
        """Forget the table of a policy that is gone."""
        self._offers.pop(policy, None)

    def answer(self, session: Session, nonce: str, rejection: tuple[str, str] | None) -> None:
        """Take up a pod's answer; one to anything but the table on its way is too late and ignored.

        Args:
            session: The pod's stream.
            nonce: The nonce it repeats.
            rejection: Reason and detail of a refusal; None for an acknowledgement.
        """
        sent = session.sent
        if sent is None or sent.nonce != nonce:
            return
        session.sent = None
        session.silent = False
        if rejection is None:
            session.acked = session.held = sent.version
            session.rejection = None
        else:
            reason, detail = rejection
            # what failed for now is sent again; any other refusal would only be repeated
            passing = reason == UnavailableError.reason
            session.rejection = Rejection(
                version=sent.version,
                reason=reason[:64],
                detail=detail[:MAX_DETAIL],
                retry_s=sent.at_s + RETRY_S if passing else None,
            )
            if not passing:
                self._refusals.remember(session.pod, session.rejection)
        if session.policy is not None:
            self._on_answer(session.policy, Outcome.ACK if rejection is None else Outcome.NACK)
            offer = self._offers.get(session.policy)
            if offer is not None and session.has_answered(offer.table.version):
                self._wait_no_longer(session, offer)
                self._settle(session, offer)
                if rejection is None:
                    # nothing more to send for now; its next heartbeat is timed already
                    return
        session.wake.set()

    def next_message(self, session: Session, now_s: float) -> pb.ControllerMessage | None:
        """Return what to send to a pod now, taken as sent; None if there is nothing.

        Ends the stream of a pod that has not answered in time.
        """
        if session.sent is not None and now_s >= session.sent.at_s + self._ack_timeout_s:
            if session.policy is not None:
                self._on_answer(session.policy, Outcome.TIMEOUT)
            session.end(
                Ending.SILENT,
                f"table {session.sent.version} was not answered in {self._ack_timeout_s:g} s",
            )
            return None
        offer = self._offers.get(session.policy or "")
        if session.sent is not None and now_s >= session.sent.at_s + SILENT_S:
            session.silent = True
            if offer is not None:
                self._wait_no_longer(session, offer)
        if session.policy is None or (offer is not None and not offer.suits(session.pod)):
            return self._release(session)
        if offer is None:
            return None
        version = offer.table.version
        retry_s = session.retry_s(version)
        due = not session.has_answered(version) or (retry_s is not None and now_s >= retry_s)
        if offer.is_turn_of(session) and session.sent is None and due:
            return self._push(session, offer, now_s)
        if session.held is not None and now_s >= self._heartbeat_s(session, offer):
            session.last_sent_s = now_s
            return pb.ControllerMessage(
                heartbeat=pb.Heartbeat(version=version_to_message(session.held))
            )
        return None

    def wait_s(self, session: Session, now_s: float) -> float | None:
        """Return for how many seconds there is nothing to send unless `Session.wake` is set; None for ever."""
        times_s = []
        if session.sent is not None:
            silence_s = (
                self._ack_timeout_s if session.silent else min(SILENT_S, self._ack_timeout_s)
            )
            times_s.append(session.sent.at_s + silence_s)
        offer = self._offers.get(session.policy or "")
        if offer is not None and offer.suits(session.pod) and session.held is not None:
            times_s.append(self._heartbeat_s(session, offer))
        if offer is not None and session.sent is None and offer.is_turn_of(session):
            retry_s = session.retry_s(offer.table.version)
            times_s += [] if retry_s is None else [retry_s]
        return max(0.0, min(times_s) - now_s) if times_s else None

    def counts(self, policy: str) -> dict[Role, Counts]:
        """Return how the pods of each role of a policy stand."""
        offer = self._offers.get(policy)
        members = list(self._by_policy.get(policy, {}).values())
        return {role: Counts.of(offer, [s for s in members if s.pod.role is role]) for role in Role}

    def _push(self, session: Session, offer: Offer, now_s: float) -> pb.ControllerMessage:
        nonce = offer.message.push.nonce
        session.sent = Sent(version=offer.table.version, nonce=nonce, at_s=now_s)
        session.last_sent_s = now_s
        return offer.message

    def _release(self, session: Session) -> pb.ControllerMessage | None:
        if not self.synced or session.held is None:
            return None
        session.held = session.acked = None
        reason = "no policy selects this pod"
        if session.policy is not None:
            reason = f"the profiles of policy {session.policy} were measured on another model"
        return pb.ControllerMessage(release=pb.Release(reason=reason))

    def _heartbeat_s(self, session: Session, offer: Offer) -> float:
        return session.last_sent_s + offer.table.ttl_s / HEARTBEATS_PER_TTL

    def _join(self, session: Session, policy: str | None) -> None:
        session.policy = policy
        if policy is None:
            return
        self._by_policy.setdefault(policy, {})[session.pod.key] = session
        offer = self._offers.get(policy)
        if offer is not None and session.held is not None and session.held > offer.table.version:
            self._on_behind(policy)

    def _leave(self, session: Session) -> None:
        if session.policy is None:
            return
        members = self._by_policy.get(session.policy, {})
        members.pop(session.pod.key, None)
        if not members:
            self._by_policy.pop(session.policy, None)
        offer = self._offers.get(session.policy)
        if offer is not None:
            self._wait_no_longer(session, offer)
            self._settle(session, offer)

    def _forget(self, session: Session) -> None:
        del self.sessions[session.pod.key]
        self._leave(session)

    def _wait_no_longer(self, session: Session, offer: Offer) -> None:
        """Let the Prefill pods have the table in force, unless another Decode pod is still waited for."""
        if session in offer.waiting:
            offer.waiting.discard(session)
            if not offer.waiting:
                members = self._by_policy.get(offer.table.policy, {}).values()
                # Decode pods have had their turn
                self._wake(s for s in members if s.pod.role is not Role.DECODE)

    def _settle(self, session: Session, offer: Offer) -> None:
        """Take note that a pod answered the table in force, or is gone."""
        if session in offer.unanswered:
            offer.unanswered.discard(session)
            if not offer.unanswered:
                self._on_settled(offer.table.policy, offer.table.version, offer.pods)

    @staticmethod
    def _wake(sessions: Iterable[Session]) -> None:
        for session in sessions:
            session.wake.set()
