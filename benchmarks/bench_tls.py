"""What TLS costs the threads that send and receive frames: processor time over loopback, with and without, in turn."""

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from kvserve_api.credentials import CredentialFiles, Credentials, Loaded
from kvserve_connector.frames import FrameSocket
from testcluster.pki import Authority

BLOB_BYTES = 8 << 20
BLOBS = 16


def credentials(folder: Path) -> Loaded:
    """Return what both ends use."""
    authority = Authority(folder, "ca")
    pair = authority.issue("pod", "pod", hosts=("127.0.0.1",))
    files = CredentialFiles(
        tls_cert_file=pair.certificate, tls_key_file=pair.key, tls_ca_file=authority.certificate
    )
    return Credentials(files, "bench", serves=True).current()


def run(loaded: Loaded | None) -> tuple[float, float]:
    """Send blobs once; return bytes a second of processor time, of the sender and of the receiver."""
    sent_s: list[float] = []

    def serve() -> None:
        frames = FrameSocket(listener.accept()[0], 10.0)
        if loaded is not None:
            assert loaded.server is not None
            frames.secure(loaded.server, server_side=True)
        frames.set_budget(120.0)
        blob = memoryview(bytes(BLOB_BYTES))
        started_s = time.thread_time()
        for _ in range(BLOBS):
            frames.send(blob)
        sent_s.append(time.thread_time() - started_s)
        frames.wait(10.0)
        frames.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        frames = FrameSocket.connect("127.0.0.1", port, timeout_s=5.0, stall_s=10.0)
        if loaded is not None:
            assert loaded.client is not None
            frames.secure(loaded.client, server_side=False)
        frames.set_budget(120.0)
        room = memoryview(bytearray(BLOB_BYTES))
        started_s = time.thread_time()
        for _ in range(BLOBS):
            frames.receive_into(room)
        received_s = time.thread_time() - started_s
        frames.close()
        thread.join()
    total = BLOBS * BLOB_BYTES
    return total / sent_s[0], total / received_s


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = credentials(Path(folder))
    rows: dict[str, list[tuple[float, float]]] = {"plain": [], "tls": []}
    for _ in range(options.rounds):
        rows["plain"].append(run(None))
        rows["tls"].append(run(loaded))
    found = {
        kind: {
            f"{end}_bytes_per_s": statistics.median(pair[index] for pair in pairs)
            for index, end in enumerate(("send", "receive"))
        }
        for kind, pairs in rows.items()
    }
    if options.json:
        print(json.dumps(found))
        return
    print("GB a second of processor time, medians")
    for kind, figures in found.items():
        print(f"{kind:>6}", *(f"{name[:-12]} {value / 1e9:.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
