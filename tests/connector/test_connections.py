"""Connections to producers between transfers."""

import socket
from dataclasses import replace

from kvserve_connector.config import ConnectorConfig
from kvserve_connector.connections import MAX_IDLE, Connections
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Gate
from kvserve_connector.remote import Remote

NEAR = Remote(host="127.0.0.1", port=1, engine_id="e", request_id="r", tokens=4)
FAR = replace(NEAR, port=2)


def opened() -> tuple[FrameSocket, socket.socket]:
    """Return a connection, and the producer's end of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return FrameSocket(near, 1.0), server.accept()[0]


def test_a_kept_connection_is_taken_once_and_by_its_producer() -> None:
    """A transfer gets the latest connection to its own producer, and nobody else gets it then."""
    connections = Connections(Gate(ConnectorConfig()))
    kept = [opened() for _ in range(3)]
    for remote, (frames, _) in zip((NEAR, NEAR, FAR), kept, strict=True):
        connections.keep(remote, frames)
    assert connections.take(NEAR) is kept[1][0]
    assert connections.take(NEAR) is kept[0][0]
    assert connections.take(NEAR) is None
    connections.close()
    assert [far.recv(1) for _, far in kept[2:]] == [b""]
    for frames, far in kept:
        frames.close()
        far.close()


def test_only_so_many_are_kept() -> None:
    """One more closes the oldest."""
    connections = Connections(Gate(ConnectorConfig()))
    kept = [opened() for _ in range(MAX_IDLE + 1)]
    for frames, _ in kept:
        connections.keep(NEAR, frames)
    oldest = kept[0][1]
    oldest.settimeout(1)
    assert oldest.recv(1) == b""
    assert sum(connections.take(NEAR) is not None for _ in range(MAX_IDLE + 1)) == MAX_IDLE
    for frames, far in kept:
        frames.close()
        far.close()


def test_what_is_not_answered_is_said() -> None:
    """Words go over a kept connection, which is kept again; to a producer that is gone nothing is said."""
    connections = Connections(Gate(ConnectorConfig()))
    frames, far = opened()
    connections.keep(NEAR, frames)
    connections.say(NEAR, [b"one", b"two"], 1.0)
    far.settimeout(1)
    assert far.recv(6, socket.MSG_WAITALL) == b"onetwo"
    assert connections.take(NEAR) is frames
    connections.say(FAR, [b"one"], 1.0)
    assert connections.take(FAR) is None
    frames.close()
    far.close()
