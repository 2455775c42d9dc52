"""What the kernel says of a connection, as frames go over it."""

import socket
import sys
import threading
import time
from statistics import median

import pytest

from kvserve_connector.frames import FrameSocket
from kvserve_connector.tcp_account import TcpProgress

ROUNDS = 7
DELAYED_S = 0.04
"""How long Linux waits with an acknowledgement at least, if it waits."""


def connected() -> tuple[FrameSocket, FrameSocket]:
    """Return both ends of a connection whose segments are as large as those of a network."""
    with socket.socket() as listener, socket.socket() as theirs:
        for each in (listener, theirs):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
        return FrameSocket(ours, 5.0), FrameSocket(theirs.dup(), 5.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps such an account")
def test_small_frames_are_acknowledged_at_once() -> None:
    """What an ACCEPT takes to be acknowledged is not 40 ms in which the link was busy, while nothing comes after it."""
    producer, consumer = connected()
    turn = threading.Semaphore(0)

    def take() -> None:
        for _ in range(ROUNDS):
            turn.acquire()
            consumer.send(bytes(200))
            consumer.receive_into(memoryview(bytearray(500)))
            consumer.receive_into(memoryview(bytearray(50_000)))
            # who answers at once is taken for one who always does
            consumer.send(bytes(16))

    reader = threading.Thread(target=take)
    reader.start()
    busy_s = []
    for _ in range(ROUNDS):
        turn.release()
        producer.receive_into(memoryview(bytearray(200)))
        before = TcpProgress.of(producer.socket)
        producer.send(bytes(500))
        time.sleep(2 * DELAYED_S)
        after = TcpProgress.of(producer.socket)
        assert before is not None
        assert after is not None
        assert after.acked_bytes - before.acked_bytes == 500
        busy_s.append(after.busy_s - before.busy_s)
        producer.send(bytes(50_000))
        producer.receive_into(memoryview(bytearray(16)))
    reader.join()
    for each in (producer, consumer):
        each.close()
    assert median(busy_s) < DELAYED_S / 2
