"""A TCP proxy that knows frames, and hands each chunk of an answer to a test to do with it what it likes."""

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kvserve_connector.protocol import HEADER, HEADER_BYTES, Kind

Mangle = Callable[[list[bytes]], list[bytes]]


@dataclass
class FrameProxy:
    """Forwards one connection; the chunks of an answer are collected, mangled and sent on.

    Attributes:
        target: The port of the real server.
        mangle: Takes the frames of an answer's chunks and what came after them, as bytes, and returns what is sent.
        chunks: The chunks' frames of the last answer, as they came.
    """

    target: int
    mangle: Mangle
    chunks: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FrameProxy":
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _answer(self, source: socket.socket, sink: socket.socket) -> None:
        held: list[bytes] = []
        with contextlib.suppress(OSError, EOFError):
            while True:
                header = _exactly(source, HEADER_BYTES)
                _, kind, _, length, _ = HEADER.unpack(header)
                frame = header + _exactly(source, length)
                if kind == Kind.CHUNK:
                    held.append(frame)
                elif held:
                    self.chunks = list(held)
                    sink.sendall(b"".join(self.mangle([*held, frame])))
                    held = []
                else:
                    sink.sendall(frame)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = source.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
