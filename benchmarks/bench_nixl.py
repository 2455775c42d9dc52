"""What carrying chunks costs over the connection and by NIXL: two processes over loopback, each way in turn.

NIXL's backend is UCX. On one machine it takes shared memory; with ``UCX_TLS=tcp`` its own TCP, as between machines
without RDMA. Processor time is that of the whole process: UCX moves bytes in a thread of its own.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

BLOB_BYTES = 8 << 20
BLOBS = 32
STALL_S = 10.0
STAGING_BYTES = 64 << 20
WAYS = {"tcp": None, "nixl, shared memory": "", "nixl, its own tcp": "tcp"}


def producer(told: Connection, transports: str | None) -> None:
    """Send blobs whenever told to; answer with processor seconds."""
    _environment(transports)
    from kvserve_connector.carriers import Sender, TcpSender
    from kvserve_connector.frames import FrameSocket
    from kvserve_connector.links import LinkState
    from kvserve_connector.staged import StagedSender
    from kvserve_connector.staging import Staging

    staging = None if transports is None else Staging(STAGING_BYTES)
    blob = memoryview(os.urandom(BLOB_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        metadata = b"" if staging is None else staging.metadata
        agent = "" if staging is None else staging.agent
        told.send((listener.getsockname()[1], agent, metadata))
        while told.recv():
            frames = FrameSocket(listener.accept()[0], STALL_S)
            frames.set_budget(120.0)
            sender: Sender = (
                TcpSender(frames, LinkState())
                if staging is None
                else StagedSender(frames, LinkState(), staging, STALL_S)
            )
            started_s = time.process_time()
            for index in range(BLOBS):
                sender.send(blob, index)
            sender.finish()
            frames.wait(STALL_S)
            told.send(time.process_time() - started_s)
            sender.close()
            frames.close()


def consumer(told: Connection, transports: str | None) -> None:
    """Receive blobs whenever told to; answer with processor and clock seconds."""
    _environment(transports)
    from kvserve_connector.carriers import Receiver, TcpReceiver
    from kvserve_connector.frames import FrameSocket
    from kvserve_connector.pieces import Offer
    from kvserve_connector.staged import StagedReceiver
    from kvserve_connector.staging import Reader

    reader = None if transports is None else Reader(STAGING_BYTES)
    port, agent, metadata = told.recv()
    told.send(True)
    while told.recv():
        frames = FrameSocket.connect("127.0.0.1", port, timeout_s=5.0, stall_s=STALL_S)
        frames.set_budget(120.0)
        receiver: Receiver = (
            TcpReceiver(frames)
            if reader is None
            else StagedReceiver(frames, reader, Offer(agent=agent, metadata=metadata), STALL_S)
        )
        clock_s, started_s = time.perf_counter(), time.process_time()
        for _ in range(BLOBS):
            receiver.receive(frames.receive_header(), BLOB_BYTES)
        told.send((time.process_time() - started_s, time.perf_counter() - clock_s))
        receiver.close()
        frames.close()


def _environment(transports: str | None) -> None:
    """Choose what UCX may use, before it is loaded."""
    if transports:
        os.environ["UCX_TLS"] = transports
        os.environ["UCX_NET_DEVICES"] = "lo"


@contextmanager
def ends(transports: str | None) -> Iterator[tuple[Connection, Connection]]:
    """Start both processes of one way."""
    spawn = multiprocessing.get_context("spawn")
    ours, pipes = zip(*(spawn.Pipe() for _ in range(2)), strict=True)
    processes = [
        spawn.Process(target=target, args=(pipe, transports), daemon=True)
        for target, pipe in zip((producer, consumer), pipes, strict=True)
    ]
    for process in processes:
        process.start()
    ours[1].send(ours[0].recv())
    ours[1].recv()
    try:
        yield ours[0], ours[1]
    finally:
        for pipe in ours:
            pipe.send(False)
        for process in processes:
            process.join(10)


def run(both: tuple[Connection, Connection]) -> tuple[float, float, float]:
    """Carry the blobs once; return bytes a second of both ends' processor time, and of the clock."""
    for pipe in both:
        pipe.send(True)
    received_s, clock_s = both[1].recv()
    sent_s: float = both[0].recv()
    total = BLOBS * BLOB_BYTES
    return total / sent_s, total / received_s, total / clock_s


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = ("send", "receive", "clock")
    found = {}
    with ends(WAYS["tcp"]) as tcp, ends("") as shared, ends("tcp") as own:
        ways = dict(zip(WAYS, (tcp, shared, own), strict=True))
        rows: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, both in ways.items():
                rows[way].append(run(both))
    for way, values in rows.items():
        medians = [statistics.median(column) for column in zip(*values, strict=True)]
        found[way] = dict(zip((f"{name}_bytes_per_s" for name in names), medians, strict=True))
    if options.json:
        print(json.dumps(found))
        return
    print(
        "GB a second of the sender's and the receiver's processor time, and of the clock; medians"
    )
    for way, figures in found.items():
        print(f"{way:>20}", *(f"{name[:-12]} {value / 1e9:.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
