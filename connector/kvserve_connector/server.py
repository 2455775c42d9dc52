"""The producer's side of transfers: a small TCP server that sends what its leases hold."""

import logging
import socket
import threading
from contextlib import suppress
from typing import Final

from kvserve_api.errors import KVServeError, UnauthenticatedError
from kvserve_connector.commands import Pull, Release, Renew
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.frames import FrameSocket
from kvserve_connector.gate import Door
from kvserve_connector.leases import LeaseBook
from kvserve_connector.metrics import Metrics
from kvserve_connector.protocol import Kind
from kvserve_connector.pulls import Pulls

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 512
IDLE_S: Final = 300.0
"""How long a connection may stay open between transfers."""


class TransferServer:
    """Serves transfers until it is closed; a thread for each connection.

    Args:
        config: The connector's settings.
        engine_id: Identity of this run of the engine.
        leases: What may be sent.
        metrics: Where outcomes are counted.
        pulls: What answers those who ask for it.

    Attributes:
        port: Where it listens.
        pulls: See there.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        engine_id: str,
        leases: LeaseBook,
        metrics: Metrics,
        pulls: Pulls,
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._leases = leases
        self._metrics = metrics
        self.pulls = pulls
        self._door = Door(config)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: set[FrameSocket] = set()
        family = socket.AF_INET6 if ":" in config.listen_host else socket.AF_INET
        self._listener = socket.create_server(
            (config.listen_host, config.listen_port), family=family, backlog=MAX_CONNECTIONS
        )
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="kvserve-server", daemon=True)

    def start(self) -> None:
        """Begin to accept connections."""
        self.pulls.start()
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and end what is under way."""
        self._closed = True
        self.pulls.close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for frames in list(self._open):
            frames.interrupt()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            frames = FrameSocket(connection, self._config.stall_s)
            self._door.knock(frames)
            threading.Thread(
                target=self._serve,
                args=(frames, str(address[0])),
                name="kvserve-send",
                daemon=True,
            ).start()

    def _serve(self, frames: FrameSocket, peer: str) -> None:
        """Answer one connection until it ends."""
        self._open.add(frames)
        try:
            self._door.admit(frames, self.port)
            while not self._closed and frames.wait(IDLE_S):
                frames.set_budget(self._config.stall_s)
                header = frames.receive_header()
                body = frames.receive_body(header)
                if header.kind == Kind.PULL:
                    frames.bind(body)
                    self.pulls.answer(frames, peer, Pull.parse(body))
                elif header.kind == Kind.RELEASE:
                    release = Release.parse(body)
                    if release.transfer or release.engine_id == self._engine_id:
                        self._leases.release(release.request_id, transfer=release.transfer)
                elif header.kind == Kind.RENEW:
                    self._leases.renew(Renew.parse(body).names)
                elif header.kind == Kind.PROBE:
                    self.pulls.probe(frames, peer)
                else:
                    self._door.expect_no(header.kind)
        except UnauthenticatedError as error:
            self._metrics.failed("send", error.reason)
            logger.warning("%s was turned away: %s", peer, error)
            self._door.turn_away(frames, error)
        except KVServeError as error:
            logger.info("connection from %s ended: %s", peer, error)
        except Exception:
            logger.exception("connection from %s failed", peer)
        finally:
            frames.close()
            self._door.leave(frames)
            self._open.discard(frames)
            self._room.release()
