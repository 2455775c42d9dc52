"""Transfers whose chunks are read by NIXL: what TCP promises holds of them too."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_loopback import LAYOUT, Pair, pair
from kvserve_api.credentials import CredentialFiles
from kvserve_api.errors import SpecError, TransferError, WireError
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.frames import FrameSocket
from kvserve_connector.links import LinkState
from kvserve_connector.outcome import Outcome
from kvserve_connector.pieces import Offer, pack_staged
from kvserve_connector.protocol import Kind, pack_header
from kvserve_connector.ready import ReadyTable
from kvserve_connector.staged import StagedReceiver, StagedSender
from kvserve_connector.staging import PIECE_BYTES, Reader, Staging, nixl
from nixl_producer import FROM, TOKENS
from tables import table

pytestmark = pytest.mark.slow

TO = (1, 2, 4, 8, 16)
PRODUCER = Path(__file__).parents[1] / "support" / "nixl_producer.py"


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> CredentialFiles:
    """A secret that both ends have."""
    path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text("a secret that is long enough to be one")
    path.chmod(0o600)
    return CredentialFiles(secret_file=path)


@dataclass
class Elsewhere:
    """A producer in another process."""

    process: subprocess.Popen[str]
    port: int
    offer: Offer
    address: int


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[None]:
    """Have NIXL's backend use its own TCP, as between two machines without RDMA: shared memory would pass a stop by."""
    try:
        nixl()
    except SpecError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        # it would take any other, like one of a shaped link that comes and goes
        patch.setenv("UCX_NET_DEVICES", "lo")
        yield


@pytest.fixture(scope="module")
def process(over_tcp: None, secret: CredentialFiles) -> Iterator[subprocess.Popen[str]]:
    """A producer that begins to start; others start meanwhile."""
    made = subprocess.Popen(
        [sys.executable, str(PRODUCER), str(secret.secret_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


@pytest.fixture(scope="module")
def both(process: subprocess.Popen[str], secret: CredentialFiles) -> Iterator[Pair]:
    """Both ends in this process; the producer elsewhere has the same KV as this one's."""
    with pair(transport="nixl", credentials=secret, staging_bytes=8 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def elsewhere(process: subprocess.Popen[str], both: Pair) -> Elsewhere:
    """The producer in another process, when it serves."""
    assert process.stdout is not None
    # NIXL writes its log there, too
    said = next(line for line in process.stdout if line.startswith("{"))
    found: dict[str, Any] = json.loads(said)
    offer = Offer(agent=found["agent"], metadata=bytes.fromhex(found["metadata"]))
    return Elsewhere(process, found["port"], offer, found["address"])


@dataclass
class Ends:
    """The two ends of one transfer's chunks, over a pair of sockets."""

    sender: StagedSender
    receiver: StagedReceiver
    frames: tuple[FrameSocket, FrameSocket]
    link: LinkState


@contextmanager
def ends(both: Pair, stall_s: float = 1.0) -> Iterator[Ends]:
    """Connect the staging memories of a pair."""
    staging, reader = memories(both)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        out = FrameSocket.connect("127.0.0.1", listener.getsockname()[1], timeout_s=5, stall_s=5)
        into = FrameSocket(listener.accept()[0], 5.0)
    for frames in (out, into):
        frames.set_budget(10.0)
        frames.bind(b"a pull")
    link = LinkState()
    sender = StagedSender(out, link, staging, stall_s)
    assert sender.offer is not None
    receiver = StagedReceiver(into, reader, sender.offer, stall_s)
    try:
        yield Ends(sender, receiver, (out, into), link)
    finally:
        sender.close()
        receiver.close()
        out.close()
        into.close()


def memories(both: Pair) -> tuple[Staging, Reader]:
    """Return the producer's memory and the consumer's."""
    staging, reader = both.server.pulls.staging, both.client.reader
    assert staging is not None
    assert reader is not None
    return staging, reader


def whole(both: Pair) -> bool:
    """Tell whether nobody has a piece of either memory."""
    staging, reader = memories(both)
    return (staging.free_pieces, reader.free_pieces) == (8, 8)


def same(both: Pair) -> bool:
    """Tell whether the target holds what the source held."""
    layers, tokens = range(LAYOUT.layers), range(TOKENS)
    ours = both.source.read_tokens(layers, tokens, FROM)
    theirs = both.target.read_tokens(layers, tokens, TO)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def wipe(both: Pair) -> None:
    """Empty the target."""
    layers, tokens = range(LAYOUT.layers), range(TOKENS)
    nothing = torch.zeros_like(both.source.read_tokens(layers, tokens, FROM)[0])
    both.target.write_tokens(layers, tokens, TO, nothing, nothing)
    assert not same(both)


def fetch(both: Pair, name: str, port: int | None = None) -> Outcome:
    """Fetch a prefill, from here or elsewhere."""
    wipe(both)
    if port is None:
        both.lease(name, TOKENS, FROM)
    return both.fetch(both.load(name, range(TOKENS), TO, port=port))


def test_kv_crosses_processes(elsewhere: Elsewhere, both: Pair) -> None:
    """What NIXL reads from another process's memory is the KV there, bit by bit."""
    outcome = fetch(both, "r0", elsewhere.port)
    assert (outcome.failure, outcome.transport) == ("", "nixl")
    assert same(both)
    assert outcome.wire_bytes > outcome.native_bytes
    assert whole(both)


def test_coded_kv_is_counted(both: Pair) -> None:
    """A lossless profile crosses too, smaller; both sides count the transfer as NIXL's, and the lease ends."""
    both.metrics.take_totals()
    both.selector.install(ReadyTable.of(table(pinned="lossless")))
    outcome = fetch(both, "coded")
    assert (outcome.failure, outcome.transport) == ("", "nixl")
    assert same(both)
    assert outcome.wire_bytes < outcome.native_bytes
    assert both.ended() == ({"coded"}, {"Sent": 1})
    both.metrics.received(outcome)
    assert both.metrics.take_totals()["transports"] == {"send nixl": 1, "receive nixl": 1}


def test_a_producer_without_it_sends_over_tcp(
    both: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A consumer that wants NIXL takes chunks over TCP from a producer that has none, and says so once."""
    monkeypatch.setattr(both.server.pulls, "staging", None)
    for index in range(2):
        outcome = fetch(both, f"plain{index}")
        assert (outcome.failure, outcome.transport) == ("", "tcp")
        assert same(both)
    assert len([r for r in caplog.records if "sends over TCP" in r.message]) == 1


def test_chunks_of_many_pieces(both: Pair) -> None:
    """Chunks larger than a piece, and more of them than the memory holds, arrive whole and teach what the link does."""
    sizes = [1, PIECE_BYTES, 5 * PIECE_BYTES + 17, 7 * PIECE_BYTES, PIECE_BYTES - 1]
    blobs = [bytes(torch.randint(256, (size,), dtype=torch.uint8).numpy()) for size in sizes]
    with ends(both) as made:
        _, into = made.frames

        def send() -> None:
            for index, blob in enumerate(blobs):
                made.sender.send(memoryview(blob), index)
            made.sender.finish()

        thread = threading.Thread(target=send)
        thread.start()
        found = [
            bytes(made.receiver.receive(into.receive_header(), len(blob))) == blob for blob in blobs
        ]
        thread.join()
        assert found == [True] * len(blobs)
        assert whole(both)
        assert made.link.snapshot(1.0).bytes_per_s > 1e6


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        pytest.param({"length": 2 * PIECE_BYTES}, "TooLarge", id="large"),
        pytest.param({"address": 4096}, "PeerLost", id="not-registered"),
        pytest.param({"past": True}, "PeerLost", id="past-the-end"),
        pytest.param({"seed": 1}, "ChecksumMismatch", id="of-another-transfer"),
        pytest.param({"flip": True}, "ChecksumMismatch", id="damaged"),
    ],
)
def test_wrong_words_are_refused(both: Pair, said: dict[str, Any], reason: str) -> None:
    """A place that is not the producer's staging memory, a size that is too large, damage: each by its reason."""
    staging, reader = memories(both)
    with ends(both) as made:
        out, into = made.frames
        address = staging.address(8) - 512 if "past" in said else staging.address(0)
        frame = bytearray(
            pack_staged(
                0,
                said.get("address", address),
                said.get("length", 1024),
                seed=said.get("seed", out.seed),
            )
        )
        frame[-6] ^= said.get("flip", False)
        out.send(frame)
        with pytest.raises((WireError, TransferError)) as raised:
            made.receiver.receive(into.receive_header(), PIECE_BYTES)
    assert raised.value.reason == reason
    assert whole(both)
    # after NIXL itself failed it is left alone for a while
    assert reader.ready == (reason != "PeerLost")
    reader._ailing_until_s = 0.0


def test_forged_metadata_is_refused(both: Pair) -> None:
    """Metadata that is none, is cut, or is another agent's ends its transfer, and no transfer of that other agent."""
    staging, reader = memories(both)
    theirs, own = staging.metadata, reader.metadata
    assert fetch(both, "before").failure == ""
    for index, (agent, metadata) in enumerate(
        (
            ("x", b"noise" * 99),
            ("x", theirs[:200]),
            ("x", theirs),
            (staging.agent, own),
            (reader.agent, theirs + own),
            (reader.agent, own[:200]),
        )
    ):
        with pytest.raises(WireError) as raised:
            reader.enter(agent, metadata)
        assert raised.value.reason == "Malformed"
        reader._ailing_until_s = 0.0
        outcome = fetch(both, f"after-{index}")
        assert (outcome.failure, outcome.transport) == ("", "nixl")


def test_pieces_come_back_from_a_consumer_that_is_gone(both: Pair) -> None:
    """Pieces that were told to a consumer are free again when its connection has ended."""
    staging, _ = memories(both)
    with ends(both) as made:
        made.sender.send(memoryview(bytes(3 * PIECE_BYTES)), 0)
        assert staging.free_pieces == 5
        made.frames[1].close()
        with pytest.raises(TransferError) as raised:
            made.sender.finish()
        assert raised.value.reason == "PeerLost"
        made.sender.close()
        assert staging.free_pieces == 8


def test_a_full_memory_is_waited_for(both: Pair) -> None:
    """A transfer that finds all pieces taken tells its consumer that it waits, and goes on when there is room."""
    staging, _ = memories(both)
    taken = [staging.take(0) for _ in range(8)]
    with ends(both, stall_s=0.3) as made:
        _, into = made.frames
        thread = threading.Thread(target=made.sender.send, args=(memoryview(b"late"), 0))
        thread.start()
        word = bytearray(16)
        into.receive_into(memoryview(word))
        assert bytes(word) == pack_header(Kind.WAIT, 0)
        for piece in taken:
            assert piece is not None
            staging.give(piece)
        assert made.receiver.receive(into.receive_header(), 4) == b"late"
        thread.join()
        made.sender.finish()
    assert whole(both)


def test_a_frozen_producer_is_a_timeout(elsewhere: Elsewhere, both: Pair) -> None:
    """A read from a stopped process ends in time; its piece is not used again before the read really ended."""
    _, reader = memories(both)
    reader.enter(elsewhere.offer.agent, elsewhere.offer.metadata)
    room = bytearray(PIECE_BYTES)

    def read(stall_s: float) -> None:
        reader.read(
            elsewhere.offer.agent,
            elsewhere.address,
            memoryview(room),
            stall_s=stall_s,
            left_s=lambda: 5.0,
            check=lambda: None,
        )

    try:
        read(5.0)
        os.kill(elsewhere.process.pid, signal.SIGSTOP)
        os.waitpid(elsewhere.process.pid, os.WUNTRACED)
        start_s = time.monotonic()
        with pytest.raises(TransferError) as raised:
            read(0.2)
        assert raised.value.reason == "Timeout"
        assert time.monotonic() - start_s < 1
        assert reader.free_pieces == 7
        assert not reader.ready
        os.kill(elsewhere.process.pid, signal.SIGCONT)
        deadline_s = time.monotonic() + 5
        while reader.free_pieces < 8 and time.monotonic() < deadline_s:
            time.sleep(0.01)
            assert not reader.ready
        assert reader.free_pieces == 8
    finally:
        os.kill(elsewhere.process.pid, signal.SIGCONT)
        reader.leave(elsewhere.offer.agent)
        reader._ailing_until_s = 0.0


def test_settings_that_can_not_be_are_refused(
    secret: CredentialFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NIXL without a secret, beside TLS, or where it is not installed ends start-up with an error that names it."""
    with pytest.raises(SpecError, match="secret_file"):
        ConnectorConfig(transport="nixl")
    with pytest.raises(SpecError, match="tls_"):
        ConnectorConfig(transport="nixl", credentials=replace(secret, tls_ca_file=Path("ca")))
    with pytest.raises(SpecError, match="must be one of"):
        ConnectorConfig(transport="rdma")
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, f"{name}._api", None)
    with pytest.raises(SpecError, match=r"kvserve\[nixl\]"):
        Staging(8 << 20)
