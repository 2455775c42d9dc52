"""Who gets in: members with all kinds of credentials, strangers, and who passes on the words of others."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile_proxy import HostileProxy
from kv_loopback import LAYOUT, Pair, pair
from kvserve_api.credentials import CredentialFiles, Credentials
from kvserve_api.errors import SpecError
from kvserve_connector import gate, handshake
from kvserve_connector.commands import Release
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.connections import Connections
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import MAX_STRANGERS, Gate
from kvserve_connector.protocol import Kind, pack_header
from members import NAME, Members

FROM, TO = (3, 9), (1, 2)
NOTHING = CredentialFiles()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The deployment that producers of these tests belong to."""
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """Another deployment."""
    return Members(tmp_path_factory.mktemp("others"), secret="o" * 40)


@contextmanager
def producer(
    credentials: CredentialFiles, consumer: CredentialFiles, **settings: Any
) -> Iterator[Pair]:
    """Start a pair whose ends have credentials of their own; settings are the consumer's."""
    with pair(credentials=credentials) as both:
        config = replace(both.config, credentials=consumer, **settings)
        both.client._connections = Connections(Gate(config))
        yield both


def fetch(both: Pair, name: str = "a", port: int | None = None) -> str:
    """Fetch a prefill and return why it failed; a success is compared bit by bit."""
    both.lease(name, 20, FROM)
    started_s = time.monotonic()
    outcome = both.fetch(both.load(name, range(20), TO, port=port))
    assert time.monotonic() - started_s < 5
    if not outcome.failure:
        ours = both.source.read_tokens(range(LAYOUT.layers), range(20), FROM)
        theirs = both.target.read_tokens(range(LAYOUT.layers), range(20), TO)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    return outcome.failure


def turned_away(both: Pair) -> int:
    """Return how many the producer has turned away, at the latest a second from now."""
    found = 0
    for _ in range(100):
        totals = both.metrics.take_totals().get("failures", {})
        found += int(totals.get("send Unauthenticated", 0))
        if found:
            break
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("kind", ["secret", "mtls", "both", "certificate-of-the-server-only"])
def test_members_transfer(members: Members, kind: str) -> None:
    """With a secret, with certificates on both sides or one, and with both, KV arrives bit by bit."""
    server, client = {
        "secret": (members.with_secret(),) * 2,
        "mtls": (members.with_tls(),) * 2,
        "both": (members.with_tls(secret=True),) * 2,
        "certificate-of-the-server-only": (
            replace(members.with_tls(), tls_ca_file=None),
            members.authority_only,
        ),
    }[kind]
    with producer(server, client) as both:
        for index in range(3):
            assert fetch(both, f"r{index}") == ""
        assert len(both.client._connections._idle) == 1
        assert both.metrics.take_totals().get("failures") is None


def strangers(members: Members, others: Members) -> dict[str, tuple[Any, Any]]:
    """Return pairs of credentials, the producer's and the consumer's, that don't belong together."""
    members.issue("late", valid_s=-60)
    tls, secret = members.with_tls(), members.with_secret()
    foreign = replace(others.with_tls(), tls_ca_file=tls.tls_ca_file)
    return {
        "no secret": (secret, NOTHING),
        "wrong secret": (secret, others.with_secret()),
        "producer without secret": (NOTHING, secret),
        "plain to TLS": (tls, NOTHING),
        "secret without TLS to TLS": (tls, secret),
        "TLS to plain": (NOTHING, tls),
        "TLS to secret": (secret, tls),
        "no certificate": (tls, members.authority_only),
        "certificate of another authority": (tls, foreign),
        "expired certificate": (tls, members.with_tls("late")),
        "producer of another authority": (foreign, tls),
        "producer's certificate expired": (members.with_tls("late"), tls),
        "certificate without secret": (members.with_tls(secret=True), tls),
        "secret unknown behind TLS": (tls, members.with_tls(secret=True)),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no secret",
        "wrong secret",
        "producer without secret",
        "plain to TLS",
        "secret without TLS to TLS",
        "TLS to plain",
        "TLS to secret",
        "no certificate",
        "certificate of another authority",
        "expired certificate",
        "producer of another authority",
        "producer's certificate expired",
        "certificate without secret",
        "secret unknown behind TLS",
    ],
)
def test_strangers_get_nothing(members: Members, others: Members, case: str) -> None:
    """Who does not belong together fails by one reason, at once, and the producer keeps the prefill for who does."""
    server, client = strangers(members, others)[case]
    with producer(server, client) as both:
        assert fetch(both) == "Unauthenticated"
        assert len(both.leases) == 1
        # where the consumer walks away first, the producer has nothing to refuse
        consumer_ends = ("wrong secret", "certificate without secret", "secret unknown behind TLS")
        if case not in consumer_ends:
            assert turned_away(both) == 1


def test_words_that_are_passed_on_prove_nothing(members: Members) -> None:
    """Who stands between two members without their producer's address gets nothing through, with a secret only."""
    with producer(members.with_secret(), members.with_secret()) as both:
        with HostileProxy(both.server.port) as proxy:
            assert fetch(both, port=proxy.port) == "Unauthenticated"
        assert turned_away(both) == 1


def test_a_stolen_address_needs_the_certificate(members: Members) -> None:
    """With TLS a proof is good for the certificate that was shown: its words don't pass through another's TLS."""
    members.issue("thief")
    thief = Credentials(members.with_tls("thief"), "thief", serves=True).current()
    ours = members.with_tls(secret=True)
    with producer(ours, ours) as both, socket.create_server(("127.0.0.1", 0)) as listener:
        real = ("127.0.0.1", both.server.port)
        # the thief has taken the producer's address, so that is what the consumer means
        both.server.port = listener.getsockname()[1]

        def pass_on() -> None:
            assert thief.server is not None
            assert thief.client is not None
            with (
                thief.server.wrap_socket(listener.accept()[0], server_side=True) as consumer,
                thief.client.wrap_socket(socket.create_connection(real)) as other,
            ):
                other.sendall(consumer.recv(4096))
                consumer.sendall(other.recv(4096))
                consumer.recv(4096)

        thread = threading.Thread(target=pass_on, daemon=True)
        thread.start()
        assert fetch(both) == "Unauthenticated"
        thread.join(5)
        assert not thread.is_alive()


def test_a_recorded_proof_is_worth_nothing(members: Members) -> None:
    """What a member said once lets nobody in who says it again, and what it asks for is not heeded."""

    class Recorded(FrameSocket):
        said = b""

        def send(self, data: Any) -> None:
            self.said += bytes(data)
            super().send(data)

    with producer(members.with_secret(), members.with_secret()) as both:
        address = ("127.0.0.1", both.server.port)
        frames = Recorded(socket.create_connection(address), 5)
        handshake.ask(frames, [members.secret.encode()], f"127.0.0.1:{address[1]}", b"")
        frames.close()
        both.lease("b", 20, FROM)
        release = Release(engine_id="producer-1", request_id="b").pack()
        with socket.create_connection(address, timeout=5) as again:
            again.sendall(frames.said + release)
            assert b"Unauthenticated" in _read_all(again)
        assert turned_away(both) == 1
        assert len(both.leases) == 1


def test_silent_strangers_keep_nobody_out(members: Members) -> None:
    """More silent connections than there is room for end the oldest of them; members get in, and all is gone after."""
    with producer(members.with_secret(), members.with_secret()) as both:
        address = ("127.0.0.1", both.server.port)
        before = threading.active_count()
        crowd = [socket.create_connection(address, timeout=5) for _ in range(3 * MAX_STRANGERS)]
        try:
            assert fetch(both) == ""
            for stranger in crowd[:MAX_STRANGERS]:
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
            deadline_s = time.monotonic() + 5
            most = before + MAX_STRANGERS + 4
            while threading.active_count() > most and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert threading.active_count() <= most
        finally:
            for stranger in crowd:
                stranger.close()


def test_a_silent_stranger_is_ended(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing, or a byte now and then, is gone when the time for the handshake is over."""
    monkeypatch.setattr(gate, "HANDSHAKE_S", 0.4)
    with producer(members.with_tls(secret=True), members.with_secret()) as both:
        for first in (b"", b"\x16\x03\x01"):
            with socket.create_connection(("127.0.0.1", both.server.port), timeout=5) as stranger:
                started_s = time.monotonic()
                stranger.sendall(first)
                with contextlib.suppress(ConnectionResetError):
                    _read_all(stranger)
                assert time.monotonic() - started_s < 2


def test_strangers_allocate_nothing(members: Members) -> None:
    """A first frame that announces much is refused by its length, before there is room for it."""
    with (
        producer(members.with_secret(), members.with_secret()) as both,
        socket.create_connection(("127.0.0.1", both.server.port), timeout=5) as stranger,
    ):
        stranger.sendall(pack_header(Kind.HELLO, 1 << 20))
        assert b"Unauthenticated" in _read_all(stranger)


def test_secrets_change_in_two_steps(tmp_path: Path) -> None:
    """With the old and the new secret known everywhere, pods may be changed one after the other."""
    members = Members(tmp_path)
    old, new = "o" * 40, "n" * 40
    steps = [(old,), (old, new), (new, old), (new,)]
    for before, after in itertools.pairwise(steps):
        for server, client in ((before, after), (after, before), (after, after)):
            with producer(members.with_secret(*server), members.with_secret(*client)) as both:
                assert fetch(both) == "", (server, client)


def test_renewed_files_are_used_without_restart(tmp_path: Path) -> None:
    """A certificate and a secret that are replaced while a pair runs hold for its next connections."""
    members = Members(tmp_path)
    files = members.with_tls(secret=True)
    with producer(files, files) as both:
        assert fetch(both, "a") == ""
        members.issue("pod")
        (tmp_path / "secret").write_text("n" * 40)
        both.client._connections._idle.popleft()[2].close()
        assert fetch(both, "b") == ""


def test_a_name_is_asked_for(members: Members) -> None:
    """With a name set, a certificate of the same authority without it is refused."""
    members.issue("elsewhere", host="elsewhere")
    for name, failure in (("pod", ""), ("elsewhere", "Unauthenticated")):
        tls = members.with_tls(name)
        with producer(tls, members.with_tls(), tls_server_name=NAME) as both:
            assert fetch(both) == failure


def test_only_peers_are_connected_to() -> None:
    """An address outside the networks that are named is not even tried."""
    config = ConnectorConfig.read({"peers": ["10.0.0.0/8", "127.0.0.0/8"]}, {}, "127.0.0.1")
    with producer(NOTHING, NOTHING, peers=config.peers) as both:
        assert fetch(both) == ""
    with producer(NOTHING, NOTHING, peers=config.peers[:1]) as both:
        tried = len(both.server._open)
        assert fetch(both) == "Unauthenticated"
        assert len(both.server._open) == tried == 0
    for wrong in (["10.0.0.1/8"], ["pods"], [7], "10.0.0.0/8"):
        with pytest.raises(SpecError, match="peers"):
            ConnectorConfig.read({"peers": wrong}, {}, "127.0.0.1")


@pytest.mark.parametrize("flip", [2000, 9000, 20_000])
def test_tls_finds_what_was_altered(members: Members, flip: int) -> None:
    """A byte that was altered on the way ends a TLS transfer by a typed reason; without a secret proxies may pass."""
    with (
        producer(members.with_tls(), members.with_tls()) as both,
        HostileProxy(both.server.port, flip_at=flip) as proxy,
    ):
        assert fetch(both, port=proxy.port) in ("ChecksumMismatch", "Malformed")


def test_a_frozen_tls_peer_is_a_timeout(members: Members) -> None:
    """Silence in the middle of a TLS transfer, and in its handshake, ends in bounded time."""
    for at in (0, 9000):
        with (
            producer(members.with_tls(), members.with_tls()) as both,
            HostileProxy(both.server.port, freeze_at=at) as proxy,
        ):
            assert fetch(both, port=proxy.port) == "Timeout"


def test_a_cancelled_tls_transfer_ends_soon(members: Members) -> None:
    """Cancelling interrupts a TLS connection too, and nothing is taken for plain bytes after."""
    with (
        producer(members.with_tls(), members.with_tls()) as both,
        HostileProxy(both.server.port, freeze_at=9000) as proxy,
    ):
        both.lease("a", 20, FROM)
        load = both.load("a", range(20), TO, port=proxy.port)
        both.client.start(load)
        proxy.wait_forwarded(5000)
        both.client.cancel(load.request_id)
        assert both.outcome(load.request_id, 0.8).failure == "Cancelled"


def _read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(4096):
        found += data
    return found
