"""A TCP proxy that harms what passes from server to client."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass
class HostileProxy:
    """Forwards connections to a port, and does to the answers what it is told.

    Attributes:
        target: The port of the real server.
        flip_at: Invert the bits of the byte at this offset of the answers.
        cut_at: Close the connection after so many bytes of the answers.
        freeze_at: Forward nothing more after so many bytes of the answers.
        bytes_per_s: Forward no faster.
    """

    target: int
    flip_at: int | None = None
    cut_at: int | None = None
    freeze_at: int | None = None
    bytes_per_s: float | None = None
    forwarded: int = 0
    connections: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> "HostileProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(5)
        self.cut()
        for each in (self._listener, *self.connections):
            each.close()

    def cut(self) -> None:
        """End all connections, on both sides."""
        for each in self.connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def wait_forwarded(self, count: int, timeout_s: float = 10) -> None:
        """Wait until so many bytes of answers have passed."""
        deadline_s = time.monotonic() + timeout_s
        while self.forwarded < count:
            assert time.monotonic() < deadline_s, f"only {self.forwarded} bytes passed"
            time.sleep(0.005)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            # little room, so that what has not been forwarded is still with the server; but room for many segments, and
            # these as on a wire: loopback's of 64 KiB fit a small one singly, and then the kernel's timers set the pace
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            self.connections += [client, server]
            try:
                server.connect(("127.0.0.1", self.target))
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                client.close()
                server.close()
                continue
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._harm, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _harm(self, source: socket.socket, sink: socket.socket) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while received := source.recv(1 << 14):
                data = bytearray(received)
                if self.flip_at is not None and done <= self.flip_at < done + len(data):
                    data[self.flip_at - done] ^= 0xFF
                if self.cut_at is not None and done + len(data) > self.cut_at:
                    sink.sendall(data[: self.cut_at - done])
                    break
                if self.freeze_at is not None and done + len(data) > self.freeze_at:
                    sink.sendall(data[: self.freeze_at - done])
                    self.forwarded += self.freeze_at - done
                    self._closed.wait()
                    break
                if self.bytes_per_s is not None:
                    # as on a wire: the last byte arrives when its time has come
                    time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
                done += len(data)
                self.forwarded += len(data)
            sink.shutdown(socket.SHUT_RDWR)
            source.shutdown(socket.SHUT_RDWR)
