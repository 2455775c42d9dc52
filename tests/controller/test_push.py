"""Who is sent which table when: the hub's decisions, by hand-turned clock."""

from dataclasses import dataclass, field

import pytest

from kvserve_api.errors import PolicyError
from kvserve_api.policy import Policy
from kvserve_api.rpc import control_pb2 as pb
from kvserve_api.table import DecisionTable, Role, Version
from kvserve_controller.compile import compile_table
from kvserve_controller.counts import Counts
from kvserve_controller.match import Pod
from kvserve_controller.push import (
    ACK_TIMEOUT_S,
    RETRY_S,
    SILENT_S,
    Hub,
)
from kvserve_controller.session import Ending, Outcome, Session
from samples import FINGERPRINT, pareto, policy_object

CHAT = Policy.from_object(policy_object())
KEY = CHAT.key


def table(counter: int, epoch: int = 1) -> DecisionTable:
    """Return a table."""
    version = Version(epoch=epoch, counter=counter)
    return compile_table(CHAT, pareto(), version=version, prior_bytes_per_s=125e6)


@dataclass
class Bench:
    """A hub with a policy, and what it told."""

    outcomes: list[Outcome] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    settled: list[tuple[str, Version, int]] = field(default_factory=list)
    now_s: float = 100.0

    def __post_init__(self) -> None:
        self.hub = Hub(
            on_answer=lambda _, outcome: self.outcomes.append(outcome),
            on_behind=self.behind.append,
            on_settled=lambda *what: self.settled.append(what),
        )
        self.hub.rematch({KEY: CHAT})

    def connect(self, name: str, role: Role, **fields: object) -> Session:
        """Connect a pod that the policy selects."""
        labels = {"app": f"chat-{role.value.lower()}"}
        arguments = {"namespace": "default", "name": name, "role": role, "labels": labels}
        return self.hub.connect(Pod(**(arguments | fields)))  # type: ignore[arg-type]

    def sent(self, session: Session) -> pb.ControllerMessage | None:
        """Return what a pod is sent now."""
        return self.hub.next_message(session, self.now_s)

    def version(self, session: Session) -> int | None:
        """Return the counter of the table a pod is sent now."""
        message = self.sent(session)
        return message.push.version.counter if message and message.HasField("push") else None

    def answer(self, session: Session, reason: str | None = None) -> None:
        """Have a pod answer what it was sent."""
        assert session.sent is not None
        rejection = None if reason is None else (reason, "detail")
        self.hub.answer(session, session.sent.nonce, rejection)


@pytest.fixture
def bench() -> Bench:
    """Return a hub with a policy."""
    return Bench()


@pytest.mark.parametrize("reason", [None, "UnknownStage"])
def test_decoders_before_producers(bench: Bench, reason: str | None) -> None:
    """A Prefill pod gets a table when all Decode pods have acknowledged or refused it, not before."""
    producer = bench.connect("p", Role.PREFILL)
    decoders = [bench.connect(f"d{n}", Role.DECODE) for n in range(2)]
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(producer) is None
    assert [bench.version(d) for d in decoders] == [1, 1]
    bench.answer(decoders[0])
    assert bench.version(producer) is None
    bench.answer(decoders[1], reason)
    assert producer.wake.is_set()
    assert bench.version(producer) == 1


def test_lost_decoder_is_not_waited_for(bench: Bench) -> None:
    """A Decode pod that disconnects, or leaves the policy, holds up nobody."""
    producer = bench.connect("p", Role.PREFILL)
    gone, moved = bench.connect("d1", Role.DECODE), bench.connect("d2", Role.DECODE)
    elsewhere = policy_object()["spec"]["targets"]
    elsewhere[1]["selector"]["matchLabels"] = {"app": "other"}
    bench.hub.offer(KEY, table(1), "")
    bench.hub.disconnect(gone)
    assert bench.version(producer) is None
    bench.hub.rematch({KEY: Policy.from_object(policy_object(targets=elsewhere))})
    assert moved.policy is None
    assert bench.version(producer) == 1


def test_silent_decoder_loses_its_stream(bench: Bench) -> None:
    """A pod that doesn't answer in time is disconnected and counted."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(decoder) == 1
    bench.now_s += SILENT_S
    assert bench.sent(decoder) is None
    assert decoder.ending is None
    assert bench.hub.wait_s(decoder, bench.now_s) == ACK_TIMEOUT_S - SILENT_S
    bench.now_s += ACK_TIMEOUT_S - SILENT_S
    assert bench.sent(decoder) is None
    assert decoder.ending is not None
    assert decoder.ending[0] is Ending.SILENT
    assert bench.outcomes == [Outcome.TIMEOUT]


def test_silent_decoder_is_waited_for_once(bench: Bench) -> None:
    """Producers wait a while for a silent decoder, and not at all with later tables until it has answered."""
    producer, decoder = bench.connect("p", Role.PREFILL), bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(decoder) == 1
    assert bench.hub.wait_s(decoder, bench.now_s) == SILENT_S
    bench.now_s += SILENT_S
    assert bench.version(producer) is None
    assert bench.sent(decoder) is None
    assert producer.wake.is_set()
    assert bench.version(producer) == 1
    bench.answer(producer)
    bench.hub.offer(KEY, table(2), "")
    assert bench.version(producer) == 2
    bench.answer(producer)
    bench.answer(decoder)
    assert bench.version(decoder) == 2
    bench.answer(decoder)
    bench.hub.offer(KEY, table(3), "")
    assert bench.version(producer) is None


def test_nobody_is_woken_in_vain(bench: Bench) -> None:
    """A change that selects the same pods wakes nobody by itself, and the last Decode answer only the Prefill pods."""
    producer, decoder = bench.connect("p", Role.PREFILL), bench.connect("d", Role.DECODE)
    bench.hub.rematch({KEY: Policy.from_object(policy_object(quality={"maxLossBasisPoints": 7}))})
    assert (producer.wake.is_set(), decoder.wake.is_set()) == (False, False)
    bench.hub.offer(KEY, table(1), "")
    assert (producer.wake.is_set(), decoder.wake.is_set()) == (False, True)
    decoder.wake.clear()
    assert bench.version(decoder) == 1
    bench.answer(decoder)
    assert (producer.wake.is_set(), decoder.wake.is_set()) == (True, False)


def test_settled_when_all_have_answered_or_gone(bench: Bench) -> None:
    """The hub tells once when every pod that was there answered a table or is gone, however it answered."""
    pods = [bench.connect(f"d{n}", Role.DECODE) for n in range(3)]
    bench.hub.offer(KEY, table(1), "")
    bench.connect("late", Role.DECODE)
    for pod in pods[:2]:
        assert bench.version(pod) == 1
    bench.answer(pods[0])
    bench.answer(pods[1], "UnknownStage")
    assert bench.settled == []
    bench.hub.disconnect(pods[2])
    assert bench.settled == [(KEY, Version(epoch=1, counter=1), 3)]


def test_late_decoder_is_not_waited_for(bench: Bench) -> None:
    """A Decode pod that connects after a table was offered gets it at once, and producers don't wait for it."""
    producer = bench.connect("p", Role.PREFILL)
    bench.hub.offer(KEY, table(1), "")
    late = bench.connect("d", Role.DECODE)
    assert (bench.version(producer), bench.version(late)) == (1, 1)


def test_only_the_newest_waits(bench: Bench) -> None:
    """Tables offered while one is on its way are passed over for the newest."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(decoder) == 1
    for counter in (2, 3, 4):
        bench.hub.offer(KEY, table(counter), "")
        assert bench.sent(decoder) is None
    bench.answer(decoder)
    assert bench.version(decoder) == 4


def test_answer_to_another_nonce_is_ignored(bench: Bench) -> None:
    """An answer that is not to the table on its way changes nothing."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    bench.sent(decoder)
    bench.hub.answer(decoder, "999", None)
    assert decoder.acked is None
    assert bench.outcomes == []


def test_refused_version_is_not_sent_again(bench: Bench) -> None:
    """After a Nack nothing is sent until there is a new version, also over a reconnect."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    bench.sent(decoder)
    bench.answer(decoder, "UnknownStage")
    assert bench.sent(decoder) is None
    again = bench.connect("d", Role.DECODE)
    assert bench.sent(again) is None
    assert bench.hub.counts(KEY)[Role.DECODE] == Counts(
        connected=1, rejected=1, message="d: UnknownStage: detail"
    )
    bench.hub.offer(KEY, table(2), "")
    assert bench.version(again) == 2


def test_what_was_refused_for_now_is_sent_again(bench: Bench) -> None:
    """A pod that could not fetch its bundles gets the same table again after a while; nobody waits for it meanwhile."""
    decoder, producer = bench.connect("d", Role.DECODE), bench.connect("p", Role.PREFILL)
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(decoder) == 1
    bench.now_s += 20.0
    bench.answer(decoder, "Unavailable")
    assert bench.version(decoder) is None
    assert bench.hub.wait_s(decoder, bench.now_s) == RETRY_S - 20.0
    assert bench.version(producer) == 1
    bench.now_s += RETRY_S - 20.0
    assert bench.version(decoder) == 1
    assert bench.hub.counts(KEY)[Role.DECODE].rejected == 1
    bench.answer(decoder)
    assert bench.hub.counts(KEY)[Role.DECODE].synced == 1


def test_a_newer_table_takes_the_place_of_a_retry(bench: Bench) -> None:
    """A producer that refused for now is not sent a newer table before its turn, nor woken in vain until then."""
    decoder, producer = bench.connect("d", Role.DECODE), bench.connect("p", Role.PREFILL)
    bench.hub.offer(KEY, table(1), "")
    assert bench.version(decoder) == 1
    bench.answer(decoder)
    assert bench.version(producer) == 1
    bench.answer(producer, "Unavailable")
    bench.hub.offer(KEY, table(2), "")
    bench.now_s += RETRY_S
    assert bench.version(producer) is None
    assert bench.hub.wait_s(producer, bench.now_s) is None
    assert bench.version(decoder) == 2
    bench.answer(decoder)
    assert bench.version(producer) == 2


def test_another_connector_is_tried_again(bench: Bench) -> None:
    """A pod that comes back able to do more gets the version it refused."""
    decoder = bench.connect("d", Role.DECODE, stages=frozenset({"a"}))
    bench.hub.offer(KEY, table(1), "")
    bench.sent(decoder)
    bench.answer(decoder, "UnknownStage")
    better = bench.connect("d", Role.DECODE, stages=frozenset({"a", "b"}))
    assert bench.version(better) == 1


def test_newer_stream_replaces_the_older(bench: Bench) -> None:
    """A pod's second stream ends its first, and it counts once."""
    first = bench.connect("d", Role.DECODE)
    second = bench.connect("d", Role.DECODE)
    assert first.ending is not None
    assert first.ending[0] is Ending.REPLACED
    bench.hub.disconnect(first)
    assert bench.hub.sessions == {"default/d": second}
    assert bench.hub.counts(KEY)[Role.DECODE].connected == 1


def test_heartbeats_renew_what_the_pod_holds(bench: Bench) -> None:
    """Every third of the time to live a pod hears of the version it holds, also after refusing a newer one."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    bench.sent(decoder)
    bench.answer(decoder)
    assert bench.sent(decoder) is None
    assert bench.hub.wait_s(decoder, bench.now_s) == 20.0
    bench.hub.offer(KEY, table(2), "")
    bench.sent(decoder)
    bench.answer(decoder, "UnknownStage")
    bench.now_s += 20.0
    message = bench.sent(decoder)
    assert message is not None
    assert message.heartbeat.version == pb.Version(epoch=1, counter=1)
    assert bench.sent(decoder) is None
    assert bench.hub.wait_s(decoder, bench.now_s) == 20.0


def test_waiting_producer_hears_heartbeats(bench: Bench) -> None:
    """A Prefill pod that waits for the decoders keeps its table alive meanwhile."""
    producer = bench.connect("p", Role.PREFILL, version=Version(epoch=1, counter=1))
    bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(2), "")
    message = bench.sent(producer)
    assert message is not None
    assert message.heartbeat.version.counter == 1
    assert bench.hub.wait_s(producer, bench.now_s) == 20.0


def test_pod_that_takes_its_time_hears_heartbeats(bench: Bench) -> None:
    """A pod that is still making a new table ready keeps the old one alive meanwhile."""
    decoder = bench.connect("d", Role.DECODE, version=Version(epoch=1, counter=1))
    bench.hub.offer(KEY, table(2), "")
    assert bench.version(decoder) == 2
    bench.now_s += SILENT_S
    assert bench.sent(decoder) is None
    assert bench.hub.wait_s(decoder, bench.now_s) == 20.0 - SILENT_S
    bench.now_s += 20.0 - SILENT_S
    message = bench.sent(decoder)
    assert message is not None
    assert message.heartbeat.version.counter == 1
    assert bench.hub.wait_s(decoder, bench.now_s) == ACK_TIMEOUT_S - 20.0


def test_pod_with_a_higher_version_raises_the_table(bench: Bench) -> None:
    """A pod that announces a higher version than the table in force makes its policy offer a higher one."""
    bench.hub.offer(KEY, table(1), "")
    bench.connect("d", Role.DECODE, version=Version(epoch=1, counter=1))
    assert bench.behind == []
    bench.connect("p", Role.PREFILL, version=Version(epoch=2, counter=1))
    assert bench.behind == [KEY]


def test_pod_without_policy_waits_for_one(bench: Bench) -> None:
    """A pod that no policy selects stays connected, and gets the table of a policy that comes later."""
    bench.hub.rematch({})
    decoder = bench.connect("d", Role.DECODE)
    assert bench.sent(decoder) is None
    assert bench.hub.wait_s(decoder, bench.now_s) is None
    bench.hub.rematch({KEY: CHAT})
    bench.hub.offer(KEY, table(1), "")
    assert decoder.wake.is_set()
    assert bench.version(decoder) == 1


def test_pod_is_released_when_its_policy_goes(bench: Bench) -> None:
    """A pod that holds a table of a deleted policy is told once to drop it."""
    decoder = bench.connect("d", Role.DECODE)
    bench.hub.offer(KEY, table(1), "")
    bench.sent(decoder)
    bench.answer(decoder)
    bench.hub.withdraw(KEY)
    bench.hub.rematch({})
    message = bench.sent(decoder)
    assert message is not None
    assert message.release.reason == "no policy selects this pod"
    assert bench.sent(decoder) is None


def test_nobody_is_released_before_the_policies_are_known() -> None:
    """A controller that has just started doesn't take away what its predecessor gave."""
    hub = Hub(on_answer=lambda *_: None, on_behind=lambda _: None)
    pod = Pod(namespace="default", name="d", role=Role.DECODE, version=Version(epoch=1, counter=1))
    session = hub.connect(pod)
    assert hub.next_message(session, 0.0) is None
    hub.rematch({})
    message = hub.next_message(session, 0.0)
    assert message is not None
    assert message.HasField("release")


def test_policy_without_a_table_releases_nobody(bench: Bench) -> None:
    """While a policy's set can't be read after a restart, its pods keep what they hold."""
    decoder = bench.connect("d", Role.DECODE, version=Version(epoch=1, counter=1))
    assert bench.sent(decoder) is None


def test_pod_of_another_model_gets_nothing(bench: Bench) -> None:
    """Profiles of one model are not pushed to a pod that serves another; it counts as rejected and says why."""
    decoder = bench.connect("d", Role.DECODE, model_fingerprint="sha256:other")
    producer = bench.connect("p", Role.PREFILL, model_fingerprint=FINGERPRINT)
    bench.hub.offer(KEY, table(1), FINGERPRINT)
    assert bench.sent(decoder) is None
    assert bench.version(producer) == 1
    count = bench.hub.counts(KEY)[Role.DECODE]
    assert (count.connected, count.rejected) == (1, 1)
    assert "serves another model than was profiled" in count.message


def test_counts(bench: Bench) -> None:
    """A role's pods are synced, stale or rejected, and never two of it."""
    good, slow, bad = (bench.connect(name, Role.DECODE) for name in ("good", "slow", "bad"))
    bench.hub.offer(KEY, table(1), "")
    for session in (good, slow, bad):
        bench.sent(session)
    bench.answer(good)
    bench.answer(bad, "UnknownStage")
    count = bench.hub.counts(KEY)[Role.DECODE]
    assert (count.connected, count.synced, count.stale, count.rejected) == (3, 1, 1, 1)
    assert bench.hub.counts(KEY)[Role.PREFILL] == Counts()


def test_role_mismatch_found_later_ends_the_stream(bench: Bench) -> None:
    """A pod whose policy comes later and has it in the other role is told then."""
    bench.hub.rematch({})
    pod = bench.connect("d", Role.DECODE, labels={"app": "chat-prefill"})
    bench.hub.rematch({KEY: CHAT})
    assert pod.ending is not None
    assert pod.ending[0] is Ending.WRONG_ROLE
    with pytest.raises(PolicyError):
        bench.connect("e", Role.DECODE, labels={"app": "chat-prefill"})
